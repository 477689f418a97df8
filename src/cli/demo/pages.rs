//! The page of each node: as `rowcache serve` shows it, with a table that can be edited.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use rand::{SeedableRng as _, distr::Distribution as _, rngs::SmallRng};
use rand_distr::Zipf;
use tokio::task::JoinSet;

use super::{
    nodes::{DemoNode, name},
    world::{EXPONENT, TABLE, key},
};
use crate::{
    TableOptions,
    key::{AnyKey, KeyType},
    postgres::json_rows::Sent,
    serve::{Serving, app::App, serve_here, table::TableSpec},
};

pub(super) struct Pages {
    served: Vec<(Arc<App>, Serving)>,
    /// They read, so that there is something to see.
    readers: JoinSet<()>,
}

/// How often rows are read for each page, and how many at a time.
const READS: (Duration, usize) = (Duration::from_millis(100), 20);

/// One for each node, not served yet.
pub(super) struct Sockets(Vec<(TcpListener, String)>);

impl Sockets {
    /// On this port and those that follow, or where there is one free.
    pub(super) fn bind(nodes: u16, first: u16) -> Result<Self> {
        let bind = |port: u16| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
            let listener = listener.or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
            let address = format!("http://{}", listener.local_addr()?);
            Ok((listener, address))
        };
        (0..nodes).map(|n| bind(first.saturating_add(n))).collect::<Result<_>>().map(Self)
    }

    pub(super) fn address(&self, node: usize) -> String {
        self.0[node].1.clone()
    }

    pub(super) fn addresses(&self) -> Vec<String> {
        self.0.iter().map(|(_, address)| address.clone()).collect()
    }
}

impl Pages {
    pub(super) async fn open(nodes: &[Arc<DemoNode>], sockets: Sockets, rows: u64) -> Result<Self> {
        let mut pages = Self { served: Vec::new(), readers: JoinSet::new() };
        for (node, (listener, _)) in nodes.iter().zip(sockets.0) {
            let spec = TableSpec {
                name: TABLE.to_owned(),
                by: Vec::new(),
                sent: Sent::All,
                writable: true,
                options: TableOptions::default(),
            };
            let (app, serving) = serve_here(&node.node, &name(node.index), listener, &[spec]).await?;
            pages.readers.spawn(read(Arc::clone(&app), rows));
            pages.served.push((app, serving));
        }
        Ok(pages)
    }

    pub(super) async fn close(mut self) {
        self.readers.shutdown().await;
        for (app, serving) in self.served {
            serving.stop(&app, Duration::from_secs(1)).await;
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
async fn read(app: Arc<App>, rows: u64) {
    let (Ok(table), Ok(popular)) = (app.table(TABLE), Zipf::new(rows as f64, EXPONENT)) else { return };
    let mut random = SmallRng::from_os_rng();
    loop {
        for _ in 0..READS.1 {
            let key = key(popular.sample(&mut random)).to_string();
            let Ok(key) = AnyKey::parse(&[KeyType::Int8], &[key]) else { return };
            // Whoever looks at the page sees that reads fail.
            let _ = table.table().get(&key).await;
        }
        tokio::time::sleep(READS.0).await;
    }
}
