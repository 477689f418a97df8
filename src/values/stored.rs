//! A value as its table has it.

use std::{
    fmt,
    marker::PhantomData,
    ops::Deref,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use sqlx::{FromRow, Row, postgres::PgRow};

use super::codec::{Codec, Json};
use crate::store::Cached;

/// What a load makes of a row.
pub(crate) struct Stored<V, C> {
    /// `None`: this node cannot read it.
    value: Option<V>,
    /// When it was written, by the database's clock, in microseconds.
    written: i64,
    /// For how much longer it is there, unless it is touched.
    pub(crate) lives: Option<Duration>,
    /// How long it may be unused.
    idle: Option<Duration>,
    /// Somebody has told, or is about to tell, that it is in use.
    touched: AtomicBool,
    codec: PhantomData<fn() -> C>,
}

impl<V, C> Stored<V, C> {
    /// One that is in no table.
    pub(super) fn alone(value: V) -> Self {
        Self {
            value: Some(value),
            written: 0,
            lives: None,
            idle: None,
            touched: AtomicBool::new(true),
            codec: PhantomData,
        }
    }

    /// When it was written, if this node cannot read it.
    pub(super) fn unreadable(&self) -> Option<i64> {
        self.value.is_none().then_some(self.written)
    }

    /// Whether it is to be told, and by whoever asks now, that a value of this age is in use.
    pub(super) fn wants_touch(&self, age: impl FnOnce() -> Duration) -> bool {
        let Some(idle) = self.idle else { return false };
        !self.touched.load(Ordering::Relaxed)
            && age() >= idle / TOUCHED_AFTER
            && !self.touched.swap(true, Ordering::Relaxed)
    }
}

/// So many times within the time that a value may be unused.
const TOUCHED_AFTER: u32 = 5;

impl<V, C: Codec<V>> FromRow<'_, PgRow> for Stored<V, C> {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let seconds = |of: Option<f64>| of.map(|of| Duration::try_from_secs_f64(of).unwrap_or_default());
        let bytes: &[u8] = row.try_get("value")?;
        let decoded = catch_unwind(AssertUnwindSafe(|| C::decode(bytes)));
        Ok(Self {
            value: decoded.ok().and_then(Result::ok),
            written: row.try_get("written")?,
            lives: seconds(row.try_get("lives")?),
            idle: seconds(row.try_get("idle")?),
            touched: AtomicBool::new(false),
            codec: PhantomData,
        })
    }
}

/// A value that was shared, or has just been computed: a shared pointer that derefs to it.
pub struct SharedValue<V, C = Json>(Cached<Stored<V, C>>);

impl<V, C> SharedValue<V, C> {
    /// The value, if this node can read it.
    pub(super) fn of(stored: Cached<Stored<V, C>>) -> Option<Self> {
        stored.value.is_some().then_some(Self(stored))
    }

    pub(super) fn alone(value: V) -> Self {
        Self(Cached::loaded(Some(Stored::alone(value))).expect("a value"))
    }
}

impl<V, C> Deref for SharedValue<V, C> {
    type Target = V;

    fn deref(&self) -> &V {
        self.0.value.as_ref().expect("made only of values that could be read")
    }
}

impl<V, C> Clone for SharedValue<V, C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V: fmt::Debug, C> fmt::Debug for SharedValue<V, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
