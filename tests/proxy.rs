//! The tools that other tests trust: the proxy breaks what it says it breaks, and the witness of the log sees all threads.

use std::{
    io::ErrorKind,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::support::{
    self, Logs, PATIENCE, database,
    proxy::{Close, Direction, Flow, Proxy},
};

/// A proxy with one connection through it: the client's end and the server's end.
async fn connected() -> (Proxy, TcpStream, TcpStream) {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap().port()).await;
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap();
    let (server, _) = server.accept().await.unwrap();
    // The server can see the connection before the proxy has it on its list.
    support::eventually("the connection is listed", async || proxy.connections().len() == 1).await;
    (proxy, client, server)
}

/// The next `N` bytes.
async fn read<const N: usize>(from: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    timeout(PATIENCE, from.read_exact(&mut bytes)).await.expect("nothing arrives").unwrap();
    bytes
}

/// How the stream ends: 0 for its end, or an error.
async fn read_end(stream: &mut TcpStream) -> Result<usize, ErrorKind> {
    timeout(PATIENCE, stream.read(&mut [0])).await.expect("it does not end").map_err(|error| error.kind())
}

/// Nothing can prove silence but time; long enough to catch a proxy that forwards, short enough for every run.
async fn assert_silent(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = timeout(Duration::from_millis(100), stream.read(&mut byte)).await;
    assert!(read.is_err(), "something arrived: {read:?}");
}

#[tokio::test]
async fn passes_both_ways_and_counts() {
    let (proxy, mut client, mut server) = connected().await;
    client.write_all(b"up").await.unwrap();
    assert_eq!(&read::<2>(&mut server).await, b"up");
    server.write_all(b"down").await.unwrap();
    assert_eq!(&read::<4>(&mut client).await, b"down");
    let connections = proxy.connections();
    let [connection] = &*connections else { panic!("{connections:?}") };
    assert_eq!((connection.bytes(Direction::Up), connection.bytes(Direction::Down)), (2, 4));
}

#[tokio::test]
async fn a_stalled_direction_loses_nothing_and_leaves_the_other_alone() {
    let (proxy, mut client, mut server) = connected().await;
    proxy.set(Direction::Down, Flow::Stall);
    server.write_all(b"later").await.unwrap();
    client.write_all(b"now").await.unwrap();
    assert_eq!(&read::<3>(&mut server).await, b"now");
    assert_silent(&mut client).await;
    proxy.set(Direction::Down, Flow::Pass);
    assert_eq!(&read::<5>(&mut client).await, b"later");
}

#[tokio::test]
async fn a_swallowing_direction_loses_bytes_and_the_end_of_the_stream() {
    let (proxy, mut client, mut server) = connected().await;
    proxy.set(Direction::Up, Flow::Swallow);
    client.write_all(b"lost").await.unwrap();
    client.shutdown().await.unwrap();
    assert_silent(&mut server).await;
    server.write_all(b"fine").await.unwrap();
    assert_eq!(&read::<4>(&mut client).await, b"fine");
    proxy.set_both(Flow::Swallow);
    server.write_all(b"lost").await.unwrap();
    assert_silent(&mut client).await;
    assert!(proxy.connections()[0].is_open());
}

#[tokio::test]
async fn delays() {
    let (proxy, mut client, mut server) = connected().await;
    let delay = Duration::from_millis(200);
    proxy.set_both(Flow::Delay(delay));
    let start = Instant::now();
    client.write_all(b"x").await.unwrap();
    assert_eq!(&read::<1>(&mut server).await, b"x");
    assert!(start.elapsed() >= delay);
}

#[tokio::test]
async fn closes_in_good_order() {
    let (proxy, mut client, mut server) = connected().await;
    // Also with unread bytes on the way, for which a plain close would reset.
    proxy.set(Direction::Up, Flow::Stall);
    client.write_all(b"unread").await.unwrap();
    proxy.close_all(Close::Fin).await;
    assert_eq!(read_end(&mut client).await, Ok(0));
    assert_eq!(read_end(&mut server).await, Ok(0));
    assert!(proxy.connections().is_empty());
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test]
async fn resets_both_sides() {
    let (proxy, mut client, mut server) = connected().await;
    proxy.close_all(Close::Rst).await;
    assert_eq!(read_end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(read_end(&mut server).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn refuses_new_connections_and_keeps_the_old() {
    let (mut proxy, mut client, mut server) = connected().await;
    proxy.refuse().await;
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    client.write_all(b"x").await.unwrap();
    assert_eq!(&read::<1>(&mut server).await, b"x");
    proxy.accept().await;
    TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap();
}

#[tokio::test]
async fn one_connection_alone_can_be_broken() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap().port()).await;
    let mut first = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap();
    support::eventually("the first connection is there", async || proxy.connections().len() == 1).await;
    let mut second = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await.unwrap();
    support::eventually("the second connection is there", async || proxy.connections().len() == 2).await;
    proxy.connections()[1].close(Close::Rst).await;
    assert_eq!(read_end(&mut second).await, Err(ErrorKind::ConnectionReset));
    assert_silent(&mut first).await;
}

pg_test! {
    async fn postgres_works_through_the_proxy_until_it_breaks(test: Test) {
        let db = database(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let client = support::connect(&proxy.url(&db.url)).await;
        client.batch_execute("select 1").await.unwrap();
        proxy.close_all(Close::Rst).await;
        client.batch_execute("select 1").await.unwrap_err();
        support::eventually("the server has noticed", async || {
            let admin = db.client().await;
            let others = "select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
            admin.query(others, &[]).await.unwrap().is_empty()
        })
        .await;
    }

    async fn a_statement_is_executed_behind_the_clients_back(test: Test) {
        let db = database(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let client = support::connect(&proxy.url(&db.url)).await;
        client.batch_execute("set application_name = 'mine'").await.unwrap();
        let connections = proxy.connections();
        let [connection] = &*connections else { panic!("{connections:?}") };
        assert!(connection.greeted_with("postgres") && !connection.greeted_with("somebody else"));
        connection.execute("set application_name = 'not mine'; select generate_series(1, 9999)").await;
        let row = client.query_one("show application_name", &[]).await.expect("the stream is in order");
        assert_eq!(row.get::<_, String>(0), "not mine");
    }

    async fn the_witness_sees_all_threads_of_its_own_test(test: Test) {
        for _ in 0..8 {
            tokio::spawn(async { tracing::warn!(n = 1, "from a task") }).await.unwrap();
        }
        tokio::task::spawn_blocking(|| tracing::error!("from a blocking thread")).await.unwrap();
        assert_eq!(test.logs.alarms().len(), 0, "these lines have other targets");
        tracing::warn!(target: "rowcache::x", key = %"k", "alarm");
        assert_eq!(test.logs.alarms()[0].text, "alarm key=k");
        assert_eq!(test.logs.containing("from a task").len(), 8);
        assert_eq!(test.logs.containing("from a blocking thread").len(), 1);
        test.logs.allow("alarm");
    }
}

#[test]
#[should_panic(expected = "unexpected alarms")]
fn an_alarm_that_nobody_announced_fails_the_test() {
    let logs = Logs::default();
    let here = logs.witness_this_thread();
    logs.allow("something else");
    tracing::error!(target: "rowcache::x", "alarm");
    drop(here);
    logs.assert_nothing_unexpected();
}
