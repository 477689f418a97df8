//! Opens the second line of a node that keeps two ([`Config::redundant_listener`](crate::Config)), whenever it has one
//! only. It has nothing to do with beats: a spare that cannot be opened is no harm.

use std::{convert::Infallible, future::pending, sync::Arc};

use tokio::time::{sleep, timeout};

use super::{PAUSE_MAX, full, no_answer, open_limit, pauses};
use crate::{error::Result, shared::Shared, sync::lock, throttle::Complaint};

/// Runs for as long as the first line, or whichever has taken over from it, is held.
pub(super) async fn keep(shared: &Arc<Shared>) -> Infallible {
    if !shared.config.redundant_listener {
        return pending().await;
    }
    let mut pauses = pauses(shared);
    let mut complaint = Complaint::default();
    let mut attached_at = None;
    loop {
        shared.spare_wanted.notified().await;
        // It lasted for a while, and is lost: the next attempts start afresh.
        if attached_at.is_some_and(|at| shared.host.now() > at + shared.config.beat) {
            pauses = self::pauses(shared);
        }
        while !lock(&shared.relay).has_spare() {
            // Before the first attempt too: what ended one line may be about to end others.
            sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
            let limit = open_limit(&shared.config);
            if let Err(error) = timeout(limit, open(shared)).await.unwrap_or_else(|_| Err(no_answer(limit))) {
                let error = full(&error);
                if complaint.is_news(&error, shared.host.now()) {
                    tracing::warn!(error, "cannot open the spare line; will try again");
                } else {
                    tracing::debug!(error, "cannot open the spare line; will try again");
                }
            }
        }
        complaint.is_settled();
        attached_at = Some(shared.host.now());
    }
}

async fn open(shared: &Arc<Shared>) -> Result<()> {
    let (id, line) = shared.open_line().await?;
    shared.attach(id, &line)
}
