//! Tells other nodes how this one is, when they ask, and asks them.
//!
//! ```text
//! question → line → inbox → applier → `Questions` ──→ the task in here: report → NOTIFY through the pool
//! ```
//!
//! Anybody can ask. So few questions wait, and at most twenty in a second are answered, each once.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result, with_causes},
    fleet::{Fleet, FleetNode, NodeReport, Reply, TableReport},
    shared::Shared,
    status::Status,
    tables::Via,
};

/// Between two answers. Each is a transaction that notifies, behind which others queue to commit.
const PAUSE: Duration = Duration::from_millis(50);

impl Shared {
    /// Answers questions, until the node is stopped.
    pub(crate) async fn answer_questions(self: Arc<Self>) {
        let mut stopping = self.stopping();
        let answering = async {
            loop {
                self.answer(self.questions.next().await).await;
                sleep(PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = answering => {}
        }
    }

    async fn answer(&self, question: Uuid) {
        let limit = self.config.beat_timeout;
        let answering = async {
            // The question came by NOTIFY, behind all that is told in this way. What is told by way of the change log may not have been
            // read yet: a fence that starts now has read what was visible before. Without one the node says that it is in doubt, even if
            // that has ended meanwhile: it may have ended by a fence that is older than the question.
            let doubt = if self.tables.is_told(None, Via::Log) { self.fence().await.err() } else { None };
            let Some(mut reply) = self.reply() else { return Ok(()) };
            if let Some(why) = doubt {
                (reply.report.is_coherent, reply.report.reason) = (false, Some(why.to_string()));
            }
            self.server.answer(question, reply.to_payload()).await
        };
        match timeout(limit, answering).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = with_causes(&error), "a question about this node was not answered");
            }
            Err(_) => tracing::debug!(?limit, "a question about this node was not answered in time"),
        }
    }

    /// How this node is. `None`: it has lost its line, and with it the session by which others know it.
    fn reply(&self) -> Option<Reply> {
        let [listener, spare] = self.listeners();
        Some(Reply { name: self.config.called().to_owned(), listener: listener?, spare, report: self.report() })
    }

    pub(crate) fn report(&self) -> NodeReport {
        let now = self.host.now();
        let as_of = self.look(|coherence| coherence.coherent_as_of());
        let reason = match self.status() {
            Status::Coherent { .. } => None,
            Status::Bypassed { why, .. } => Some(why.to_string()),
        };
        let tables = self.tables.figures().into_iter().map(|(name, is_coherent, stats)| TableReport {
            name,
            is_coherent,
            entries: stats.entries,
            used: stats.used,
            capacity: stats.capacity,
            gets: stats.gets,
            hits: stats.hits,
        });
        NodeReport {
            id: self.id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.host.name(),
            process: std::process::id(),
            address: self.config.address.clone(),
            uptime: now.saturating_sub(self.started),
            is_coherent: reason.is_none(),
            as_of: as_of.map(|as_of| now.saturating_sub(as_of)),
            staleness_bound: self.config.staleness_bound(),
            reason,
            gaps: self.counters.gaps.get(),
            tables: tables.collect(),
            tables_left_out: 0,
        }
    }

    /// Asks all nodes, this one too.
    pub(crate) async fn ask_all(&self, deadline: Duration) -> Result<Fleet> {
        let mut stopping = self.stopping();
        let nodes = tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => Err(Error::new(Kind::Closed, "the node was shut down")),
            nodes = self.server.ask_all(deadline) => nodes,
        }?;
        let own = self.listeners();
        let is_this = |node: &FleetNode| {
            own.contains(&Some(node.listener_pid)) || node.report.as_ref().is_some_and(|report| report.id == self.id)
        };
        let mut nodes = nodes.unwrap_or_else(|| vec![self.alone()]);
        for node in &mut nodes {
            node.is_this = is_this(node);
        }
        Ok(Fleet { deadline, nodes })
    }

    /// This node, of a database in memory.
    fn alone(&self) -> FleetNode {
        let (name, report) = (self.config.called().to_owned(), Some(self.report()));
        FleetNode {
            name,
            listener_pid: 0,
            client: None,
            connected: Some(self.host.now().saturating_sub(self.started)),
            is_this: true,
            report,
        }
    }
}
