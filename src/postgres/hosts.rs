//! A list of hosts, one by one: tokio-postgres tries them in order, and goes on to the next only after an error. One that
//! accepts connections and then says nothing would be all that is ever tried.

use tokio_postgres::{
    Config,
    config::{Host, LoadBalanceHosts},
};

/// A configuration for each host, in order. The one that was given if it has one host, or a list that no host may be picked
/// from, since it is to be shuffled or does not add up.
pub(crate) fn each(config: &Config) -> Vec<Config> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    let fits = |len: usize| len <= 1 || len == count;
    let shuffled = config.get_load_balance_hosts() != LoadBalanceHosts::Disable;
    if count <= 1 || shuffled || !fits(hosts.len()) || !fits(addresses.len()) || !fits(ports.len()) {
        return vec![config.clone()];
    }
    let one = |n: usize| {
        let mut one = without_hosts(config);
        match hosts.get(n) {
            Some(Host::Tcp(name)) => drop(one.host(name)),
            #[cfg(unix)]
            Some(Host::Unix(path)) => drop(one.host_path(path)),
            None => {}
        }
        if let Some(address) = addresses.get(n) {
            one.hostaddr(*address);
        }
        if let Some(port) = ports.get(n).or(ports.first()) {
            one.port(*port);
        }
        one
    };
    (0..count).map(one).collect()
}

fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    copy.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    config.get_user().map(|it| copy.user(it));
    config.get_password().map(|it| copy.password(it));
    config.get_dbname().map(|it| copy.dbname(it));
    config.get_options().map(|it| copy.options(it));
    config.get_application_name().map(|it| copy.application_name(it));
    config.get_connect_timeout().map(|it| copy.connect_timeout(*it));
    config.get_tcp_user_timeout().map(|it| copy.tcp_user_timeout(*it));
    config.get_keepalives_interval().map(|it| copy.keepalives_interval(it));
    config.get_keepalives_retries().map(|it| copy.keepalives_retries(it));
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: &str = "user=u password=p dbname=d options='-c a=b' application_name=n sslmode=require connect_timeout=1 \
        sslnegotiation=direct tcp_user_timeout=2 keepalives=0 keepalives_idle=3 keepalives_interval=4 keepalives_retries=5 \
        target_session_attrs=read-write channel_binding=require load_balance_hosts=disable";

    fn parsed(hosts: &str) -> Config {
        format!("{hosts} {REST}").parse().expect("parses")
    }

    #[test]
    fn each_host_keeps_everything_else() {
        let expected = [parsed("host=a port=1"), parsed("host=/b port=2")];
        assert!(each(&parsed("host=a,/b port=1,2")) == expected);
        let expected = [parsed("host=a hostaddr=127.0.0.1 port=7"), parsed("host=b hostaddr=127.0.0.2 port=7")];
        assert!(each(&parsed("host=a,b hostaddr=127.0.0.1,127.0.0.2 port=7")) == expected);
        assert!(each(&parsed("host=a")) == [parsed("host=a")]);
    }

    #[test]
    fn a_list_that_is_to_be_shuffled_or_does_not_add_up_is_left_to_the_driver() {
        for list in [
            "host=a,b load_balance_hosts=random",
            "host=a,b,c port=1,2",
            "host=a,b hostaddr=127.0.0.1,127.0.0.2,127.0.0.3",
        ] {
            let config: Config = list.parse().expect("parses");
            assert!(each(&config) == [config], "{list}");
        }
    }
}
