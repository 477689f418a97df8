//! Tables that are told by way of the change log: nothing is missed, whoever commits when; what a node was away for is read
//! afterwards; poolers and standbys.

#[macro_use]
mod support;
mod fixture;

#[path = "log/away.rs"]
mod away;
#[path = "log/commits.rs"]
mod commits;
#[path = "log/mixed.rs"]
mod mixed;
#[path = "log/retention.rs"]
mod retention;
#[path = "log/standby.rs"]
mod standby;

use fixture::{Users, hasty, name, users, users_db};
use rowcache::{Config, Node};
use support::TestDb;

/// [`fixture::users_db`], with the table told by way of the log.
async fn log_db(test: &support::Test) -> TestDb {
    let db = users_db(test.version).await;
    db.execute(VIA_LOG).await;
    db
}

const VIA_LOG: &str = "select rowcache.track('public.users', via => 'log')";

/// Of a node that does not listen.
fn deaf(url: &str) -> Config {
    let mut config = hasty(url);
    config.listen = false;
    config
}

/// A node that listens, and one that does not.
async fn both(db: &TestDb) -> [(Node, Users); 2] {
    let mut nodes = Vec::new();
    for config in [hasty(&db.url), deaf(&db.url)] {
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        nodes.push((node, users));
    }
    nodes.try_into().expect("two")
}

fn is_held(users: &Users, id: i64) -> bool {
    users.peek(&id).is_known()
}

fn held_name(users: &Users, id: i64) -> Option<String> {
    users.peek(&id).row().map(|user| user.name.clone())
}
