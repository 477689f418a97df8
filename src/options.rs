//! Every knob of one table.

use std::{
    any::{Any, type_name},
    fmt,
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    audit,
    error::{Error, Kind, Result},
    freshness::Fallback,
    store::{Bounds, Early, Expiry, Lifetime, Rescue, Weigh},
    tier::{Form, Tier},
    values::{Codec, Json},
};

/// Options of one table. More will come; start from `Default`.
///
/// # How long it is held
///
/// Until it changes, which messages tell; and for at most [`ttl`](Self::ttl), an hour, in case something changes that no message tells. Rows
/// can have a [`lifetime`](Self::lifetime) of their own, such as a session with the time at which it ends; and entries can
/// expire that nobody has used for some time ([`idle`](Self::idle)). With [`refresh_ahead`](Self::refresh_ahead), what is used is read again before it
/// expires. Times are kept to a tenth of a second.
///
/// ```
/// use std::time::{Duration, SystemTime};
///
/// use rowcache::TableOptions;
///
/// struct Session {
///     ends: SystemTime,
/// }
///
/// let options = TableOptions::default()
///     .idle(Duration::from_secs(900))
///     // One that has ended has no time left: it is returned, and not held.
///     .lifetime(|session: &Session| Some(session.ends.duration_since(SystemTime::now()).unwrap_or_default()));
/// # let _ = options;
/// ```
///
/// # When Postgres does not answer
///
/// A load fails after [`load_timeout`](Self::load_timeout), and everybody who waits for it is told. With
/// [`stale_if_error`](Self::stale_if_error) they are given what is held, if it is not known to be wrong; with
/// [`soft_timeout`](Self::soft_timeout), before that. After a few loads that did not reach Postgres, the others fail at once
/// ([`breaker`](Self::breaker)).
///
/// ```
/// use std::time::Duration;
///
/// use rowcache::TableOptions;
///
/// let options = TableOptions::default()
///     .stale_if_error(Duration::from_secs(300))
///     .soft_timeout(Duration::from_millis(100));
/// # let _ = options;
/// ```
///
/// # How much is held
///
/// Rows are bounded by their number ([`capacity`](Self::capacity)), or by the memory that they take
/// ([`bytes`](Self::bytes)). Rows that do not exist are held as well, and have a bound of their own
/// ([`absent_bytes`](Self::absent_bytes)): whoever asks for keys that he made up evicts no row. If each of those still costs
/// Postgres more than it should, [`not_found_max`](Self::not_found_max) bounds that, too. What must never be evicted is
/// [pinned](crate::Table::pin).
///
/// ```
/// use rowcache::TableOptions;
///
/// struct Document {
///     title: String,
///     body: Vec<u8>,
/// }
///
/// let options = TableOptions::default()
///     .bytes(64 << 20)
///     .weigher(|document: &Document| document.title.capacity() + document.body.capacity())
///     .absent_bytes(1 << 20);
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TableOptions {
    /// Rows held before the least useful are evicted. With [`bytes`](Self::bytes) only the number that is expected, which need
    /// not be near. Default 100,000.
    pub capacity: usize,
    /// The memory that rows may take, in bytes, in place of a number of rows. A row counts with the bytes that Postgres sent of it,
    /// or what [`weigher`](Self::weigher) says, its key, and everything that the cache needs for an entry, some 200 bytes. The
    /// largest row that can be held is a little smaller than a megabyte, or than the bound if that is less. Default: none.
    pub bytes: Option<usize>,
    weigher: Option<Erased>,
    /// The memory, in bytes, that rows may take of which the cache knows that they do not exist. 0: that is never held. Default 4 MiB: about
    /// 20,000 keys that are numbers.
    pub absent_bytes: usize,
    /// Loads a second that may find no row, for tables that strangers can ask for keys they made up. Once a second's worth has found
    /// nothing, what is not held is refused ([`is_throttled`](crate::Error::is_throttled)) at once, until time has paid for it; what is
    /// held, absent rows included, is served. While it refuses, rows that do exist and are not held are refused, too: nobody
    /// can tell before Postgres has. So set it well above what your service asks for in vain. Default: none.
    pub not_found_max: Option<NonZeroU32>,
    /// Entries are served for at most this long after their load started, absent ones too; at least a second. It is a safety net, for what
    /// the promise does not cover: a trigger that somebody switched off and on between two looks, rows that depend on the time or on
    /// a function. Default 1 hour: 100,000 entries cost some 30 readings by key a second then, in a few statements. `None`: until they change.
    pub ttl: Option<Duration>,
    /// Entries expire by up to this share of [`ttl`](Self::ttl) earlier, at random, so that those that were loaded together do not all expire at
    /// once, on this node and on others. From 0 to 1. Default 0.1.
    pub jitter: f64,
    /// Entries expire that have not been used for this long; at least a second. Each hit then looks at the time of the last one. Default: none.
    pub idle: Option<Duration>,
    /// After this share of its life, more than 0 and less than 1, an entry that is used is read again in the background, and served
    /// meanwhile: so nobody waits for what is used all the time. Default: none.
    pub refresh_ahead: Option<f64>,
    /// The method `XFetch`: each hit draws a lot, and the nearer the end of an entry, and the longer its load took, the likelier it is read again in the
    /// background, so that the nodes of a fleet, and the entries of a table, do it at different times. The number is how much earlier
    /// than the optimum: 1 is what the paper calls so. For what takes long to load, such as a memo; loads by key take a millisecond, and times
    /// are kept to a tenth of a second. In place of [`refresh_ahead`](Self::refresh_ahead). Default: none.
    pub xfetch: Option<f64>,
    lifetime: Option<Erased>,
    /// When a load fails because Postgres does not answer or refuses, what is held answers all the same: for this long after it has
    /// expired; and while the node is not coherent, for this long after the last fence was sent. It is never a row that is known
    /// to have changed, nor one whose [`lifetime`](Self::lifetime) has ended. Reads that ask for more than
    /// [`Freshness::Coherent`](crate::Freshness::Coherent) fail. Default: none, reads fail.
    pub stale_if_error: Option<Duration>,
    /// Callers wait so long for a load, if `stale_if_error` has something for them; then they are given that, and the load goes on.
    /// Default: none, they wait for [`load_timeout`](Self::load_timeout).
    pub soft_timeout: Option<Duration>,
    /// A load fails that takes longer than this, the wait for a connection included. Of this handle and its clones alone. Default:
    /// [`Config::load_timeout`](crate::Config::load_timeout).
    pub load_timeout: Option<Duration>,
    /// After so many loads in a row that did not reach Postgres (statements, not keys), further ones fail at once
    /// ([`is_unavailable`](crate::Error::is_unavailable)), but for one a second, until one succeeds or the node becomes coherent. Callers do
    /// not wait for what will not come, and a server that comes back is not met by a crowd. Default 5; `None`: each load tries.
    pub breaker: Option<NonZeroU32>,
    /// What becomes of a row that has changed. Default: it is forgotten.
    pub on_change: OnChange,
    /// What reads do while the node is not coherent. Of this handle and its clones alone: another handle of the same table
    /// may have another one. Default: they read Postgres.
    pub fallback: Fallback,
    /// After a gap, up to this many of the rows that were used most before it are read again, one statement of
    /// [`load_keys_max`](crate::Config::load_keys_max) keys at a time. Others are read when they are asked for. Default 0.
    pub refill: usize,
    /// Hits a second (not those of [`try_get`](crate::Table::try_get)) of which the row is read again, at most; if a row is not
    /// what was served, and no change on its way explains it, it is forgotten, counted ([`Audits`](crate::Audits)), logged and
    /// told ([`Event::Incoherent`](crate::Event::Incoherent)). Never for another reason. At most 1000. Each costs a reading by
    /// key, in one statement per [`beat`](crate::Config::beat) and [`load_keys_max`](crate::Config::load_keys_max) keys, and
    /// a load a hash of the row. Default 0: none.
    pub audit: u32,
    tier: Option<Erased>,
    /// Events that are kept for [`Table::explain`](crate::Table::explain): the latest of what took entries away, a few hundred bytes each
    /// at most. Default 256.
    pub history: usize,
}

/// What becomes of a row that has changed, beside that it is forgotten at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnChange {
    /// The next one who asks for it loads it.
    #[default]
    Evict,
    /// If it was held, and had been used since it was loaded, it is read again in the background, so that probably nobody has to wait for it: some
    /// 10 ms later, together with whatever else has changed by then, one batch at a time. So a row that changes all the
    /// time is read by this at most 100 times a second, and one that nobody uses is not read. Each hit then looks at when the entry was last used.
    Refresh,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            capacity: 100_000,
            bytes: None,
            weigher: None,
            absent_bytes: 4 << 20,
            not_found_max: None,
            ttl: Some(Duration::from_hours(1)),
            jitter: 0.1,
            idle: None,
            refresh_ahead: None,
            xfetch: None,
            lifetime: None,
            stale_if_error: None,
            soft_timeout: None,
            load_timeout: None,
            breaker: NonZeroU32::new(5),
            on_change: OnChange::default(),
            fallback: Fallback::default(),
            refill: 0,
            audit: 0,
            tier: None,
            history: 256,
        }
    }
}

impl TableOptions {
    /// With this many rows at most.
    #[must_use]
    pub fn capacity(mut self, rows: usize) -> Self {
        self.capacity = rows;
        self
    }

    /// With rows bounded by the memory that they take, in bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// With `heap` to say how many bytes a value owns outside of itself, for [`bytes`](Self::bytes): for values that are much larger
    /// than what Postgres sent of them, or much smaller. Called once for each row that is loaded; it must not take long. If
    /// it panics, that load fails.
    #[must_use]
    pub fn weigher<V: 'static>(mut self, heap: impl Fn(&V) -> usize + Send + Sync + 'static) -> Self {
        let heap: Heap<V> = Arc::new(heap);
        self.weigher = Some(Erased { of: type_name::<V>(), it: Arc::new(heap) });
        self
    }

    /// With this much memory for rows that do not exist, in bytes.
    #[must_use]
    pub fn absent_bytes(mut self, bytes: usize) -> Self {
        self.absent_bytes = bytes;
        self
    }

    /// With at most this many loads a second that find nothing.
    #[must_use]
    pub fn not_found_max(mut self, a_second: NonZeroU32) -> Self {
        self.not_found_max = Some(a_second);
        self
    }

    /// With entries that expire so long after their load started; `None`: never.
    #[must_use]
    pub fn ttl(mut self, ttl: impl Into<Option<Duration>>) -> Self {
        self.ttl = ttl.into();
        self
    }

    /// With entries that expire by up to this share earlier.
    #[must_use]
    pub fn jitter(mut self, share: f64) -> Self {
        self.jitter = share;
        self
    }

    /// With entries that expire when nobody has used them for so long.
    #[must_use]
    pub fn idle(mut self, idle: Duration) -> Self {
        self.idle = Some(idle);
        self
    }

    /// With entries that are read again after this share of their life, if they are used then.
    #[must_use]
    pub fn refresh_ahead(mut self, share: f64) -> Self {
        self.refresh_ahead = Some(share);
        self
    }

    /// With entries that are read again at random before they expire: [`xfetch`](Self::xfetch).
    #[must_use]
    pub fn xfetch(mut self, beta: f64) -> Self {
        self.xfetch = Some(beta);
        self
    }

    /// With `lifetime` to say for how long a row may be served, counted from when its load started, in place of [`ttl`](Self::ttl) and its jitter;
    /// `None`: as the others. Zero: it is returned to those who wait for it, and not held. Called once for each row that is
    /// loaded; it must not take long. If it panics, that load fails.
    #[must_use]
    pub fn lifetime<V: 'static>(mut self, lifetime: impl Fn(&V) -> Option<Duration> + Send + Sync + 'static) -> Self {
        let lifetime: Lifetime<V> = Arc::new(lifetime);
        self.lifetime = Some(Erased { of: type_name::<V>(), it: Arc::new(lifetime) });
        self
    }

    /// With what is held served when Postgres does not answer, for up to so long.
    #[must_use]
    pub fn stale_if_error(mut self, max: Duration) -> Self {
        self.stale_if_error = Some(max);
        self
    }

    /// With callers who wait so long for a load before what is held is served.
    #[must_use]
    pub fn soft_timeout(mut self, wait: Duration) -> Self {
        self.soft_timeout = Some(wait);
        self
    }

    /// With loads that may take so long.
    #[must_use]
    pub fn load_timeout(mut self, limit: Duration) -> Self {
        self.load_timeout = Some(limit);
        self
    }

    /// With loads refused after so many in a row that did not reach Postgres; `None`: never.
    #[must_use]
    pub fn breaker(mut self, failures: impl Into<Option<NonZeroU32>>) -> Self {
        self.breaker = failures.into();
        self
    }

    /// With this to do when a row has changed.
    #[must_use]
    pub fn on_change(mut self, on_change: OnChange) -> Self {
        self.on_change = on_change;
        self
    }

    /// With this to do while the node is not coherent.
    #[must_use]
    pub fn fallback(mut self, fallback: Fallback) -> Self {
        self.fallback = fallback;
        self
    }

    /// With up to this many rows read again after a gap.
    #[must_use]
    pub fn refill(mut self, rows: usize) -> Self {
        self.refill = rows;
        self
    }

    /// With so many events kept for [`Table::explain`](crate::Table::explain).
    #[must_use]
    pub fn history(mut self, events: usize) -> Self {
        self.history = events;
        self
    }

    /// With up to this many hits a second read again, to show that they were right.
    #[must_use]
    pub fn audit(mut self, a_second: u32) -> Self {
        self.audit = a_second;
        self
    }

    /// With a tier that is asked for what is not held, before Postgres is; for rows as JSON. The table must be opened with it each time, and by its
    /// key or by columns ([`table_by`](crate::Node::table_by), [`list_by`](crate::Node::list_by)).
    ///
    /// A value is put into the tier only if what its bytes are decoded to equals it, and taken from it only if it is encoded to the bytes that
    /// it was made of. So a field that is left out, or that an older version of your service did not know, costs a load, and is
    /// never made up.
    ///
    /// ```
    /// # #[cfg(feature = "redis")]
    /// # fn example() -> rowcache::Result<()> {
    /// use rowcache::{TableOptions, Tier};
    ///
    /// #[derive(PartialEq, serde::Serialize, serde::Deserialize)]
    /// struct User {
    ///     name: String,
    /// }
    ///
    /// let tier = Tier::redis("redis://cache.internal/")?;
    /// let options = TableOptions::default().tier::<User>(&tier);
    /// # let _ = options;
    /// # Ok(())
    /// # }
    /// # #[cfg(feature = "redis")]
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async { example().unwrap() });
    /// ```
    #[must_use]
    pub fn tier<V: PartialEq + Serialize + DeserializeOwned + 'static>(self, tier: &Tier) -> Self {
        self.tier_in::<V, Json>(tier)
    }

    /// As [`tier`](Self::tier), with rows as this codec writes them.
    #[must_use]
    pub fn tier_in<V: PartialEq + 'static, C: Codec<V>>(mut self, tier: &Tier) -> Self {
        let tiering: Tiering<V> = (tier.clone(), Arc::new(Form::of::<C>()));
        self.tier = Some(Erased { of: type_name::<V>(), it: Arc::new(tiering) });
        self
    }

    /// The tier, and how its values are written.
    pub(crate) fn tiering<V: 'static>(&self) -> Result<Option<Tiering<V>>> {
        self.tier.as_ref().map(|erased| erased.get::<Tiering<V>, V>("tier").cloned()).transpose()
    }

    /// Fails if there is a tier for what can have none.
    pub(crate) fn check_untiered(&self, what: &str) -> Result<()> {
        if self.tier.is_none() {
            return Ok(());
        }
        let message = format!("a `tier` is for rows by key or by columns, not for {what}");
        Err(Error::new(Kind::Config, message))
    }

    /// Fails if entries that are not single rows are to be audited.
    pub(crate) fn check_unaudited(&self) -> Result<()> {
        if self.audit == 0 {
            return Ok(());
        }
        let message = "`audit` compares a row with what was served of it: it is for tables, not for lists and views";
        Err(Error::new(Kind::Config, message))
    }

    /// Fails if shared values are to be held in a way that is not for them.
    pub(crate) fn check_shared(&self) -> Result<()> {
        self.check_untiered("shared values")?;
        let (audit, idle) = (self.audit > 0, self.idle.is_some());
        let others = [("audit", audit), ("lifetime", self.lifetime.is_some()), ("weigher", self.weigher.is_some())];
        if let Some((name, _)) = others.iter().find(|(_, is_set)| *is_set) {
            return Err(Error::new(Kind::Config, format!("`{name}` is not for shared values")));
        }
        if idle {
            let message = "how long shared values may be unused is said with `Share::idle`, for all nodes";
            return Err(Error::new(Kind::Config, message));
        }
        Ok(())
    }

    /// Fails if entries of which no bytes are received are to be weighed by them.
    pub(crate) fn check_weighed(&self) -> Result<()> {
        if self.bytes.is_none() || self.weigher.is_some() {
            return Ok(());
        }
        Err(Error::new(Kind::Config, "what a view holds is bounded by `bytes` with a `weigher`, or by `capacity`"))
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::new(Kind::Config, message));
        if self.audit > audit::RATE_MAX {
            return wrong(format!("`audit` must be at most {} a second", audit::RATE_MAX));
        }
        if self.weigher.is_some() && self.bytes.is_none() {
            return wrong("a `weigher` weighs rows for `bytes`, which is not set".into());
        }
        if [self.ttl, self.idle].into_iter().flatten().any(|time| time < SHORTEST) {
            return wrong(
                "`ttl` and `idle` must be at least a second: what changes is told by messages, not by them".into(),
            );
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            return wrong("`jitter` is a share of `ttl`, from 0 to 1".into());
        }
        if self.soft_timeout.is_some() && self.stale_if_error.is_none() {
            return wrong("`soft_timeout` gives callers what `stale_if_error` allows, which is not set".into());
        }
        if [self.soft_timeout, self.load_timeout].contains(&Some(Duration::ZERO)) {
            return wrong("`soft_timeout` and `load_timeout` must be more than nothing".into());
        }
        if self.refresh_ahead.is_some_and(|share| !(share > 0.0 && share < 1.0)) {
            return wrong("`refresh_ahead` is a share of an entry's life: more than 0, and less than 1".into());
        }
        if self.xfetch.is_some_and(|beta| !(beta > 0.0 && beta <= 1000.0)) {
            return wrong("`xfetch` is more than 0, and at most 1000; 1 will do".into());
        }
        if self.refresh_ahead.is_some() && self.xfetch.is_some() {
            return wrong("`refresh_ahead` and `xfetch` are two ways to do the same: one of them".into());
        }
        if self.early().is_some() && self.ttl.is_none() && self.lifetime.is_none() {
            return wrong(
                "`refresh_ahead` and `xfetch` read again what is about to expire, and without `ttl` nothing is".into(),
            );
        }
        Ok(())
    }

    /// When what is used is read again before it expires.
    pub(crate) fn early(&self) -> Option<Early> {
        self.refresh_ahead.map(Early::Share).or(self.xfetch.map(Early::Chance))
    }

    /// How long entries live.
    pub(crate) fn expiry<V: 'static>(&self) -> Result<Expiry<V>> {
        let of = self.lifetime.as_ref().map(|erased| erased.get::<Lifetime<V>, V>("lifetime")).transpose()?;
        let rescue = self.stale_if_error.map(|max| Rescue { max, after: self.soft_timeout });
        Ok(Expiry { ttl: self.ttl, jitter: self.jitter, idle: self.idle, of: of.cloned(), rescue })
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { rows: self.capacity, bytes: self.bytes, absent_bytes: self.absent_bytes }
    }

    /// How rows of this type are weighed.
    pub(crate) fn weigh<V: 'static>(&self) -> Result<Weigh<V>> {
        match (&self.weigher, self.bytes) {
            (_, None) => Ok(Weigh::One),
            (None, Some(_)) => Ok(Weigh::Received),
            (Some(erased), Some(_)) => Ok(Weigh::With(Arc::clone(erased.get::<Heap<V>, V>("weigher")?))),
        }
    }
}

const SHORTEST: Duration = Duration::from_secs(1);

/// A tier, and how values of this type are written for it.
pub(crate) type Tiering<V> = (Tier, Arc<Form<V>>);

type Heap<V> = Arc<dyn Fn(&V) -> usize + Send + Sync>;

/// Something that depends on the type of values, in options that do not: a [`Heap`], a [`Lifetime`].
#[derive(Clone)]
struct Erased {
    of: &'static str,
    it: Arc<dyn Any + Send + Sync>,
}

impl Erased {
    fn get<T: 'static, V>(&self, option: &str) -> Result<&T> {
        self.it.downcast_ref().ok_or_else(|| {
            let (theirs, ours) = (self.of, type_name::<V>());
            Error::new(Kind::Config, format!("the `{option}` is for values of type {theirs}, and the table has {ours}"))
        })
    }
}

impl fmt::Debug for Erased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of {}", self.of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weigher_is_for_one_type_of_values() {
        let options = TableOptions::default().bytes(1 << 20).weigher(|text: &String| text.capacity());
        assert!(matches!(options.weigh::<String>(), Ok(Weigh::With(_))));
        let error = options.weigh::<Vec<u8>>().err().expect("refused");
        assert!(error.is_config());
        assert!(error.to_string().contains("alloc::string::String, and the table has alloc::vec::Vec<u8>"), "{error}");
        assert!(TableOptions::default().weigher(|_: &u8| 0).check().is_err());
        assert!(matches!(TableOptions::default().bytes(1).weigh::<u8>(), Ok(Weigh::Received)));
        assert!(matches!(TableOptions::default().weigh::<u8>(), Ok(Weigh::One)));
        let options = TableOptions::default().lifetime(|_: &String| None);
        assert!(options.expiry::<String>().is_ok());
        let error = options.expiry::<u8>().err().expect("refused");
        assert!(error.is_config() && error.to_string().contains("`lifetime`"), "{error}");
    }

    #[test]
    fn times_and_shares_that_make_no_sense_are_refused() {
        let options = TableOptions::default;
        let short = Duration::from_millis(999);
        for (wrong, names) in [
            (options().ttl(short), "`ttl`"),
            (options().soft_timeout(short), "`stale_if_error`"),
            (options().load_timeout(Duration::ZERO), "`load_timeout`"),
            (options().idle(short), "`idle`"),
            (options().jitter(1.5), "`jitter`"),
            (options().jitter(f64::NAN), "`jitter`"),
            (options().refresh_ahead(0.0), "`refresh_ahead`"),
            (options().refresh_ahead(1.0), "`refresh_ahead`"),
            (options().ttl(None).refresh_ahead(0.5), "`ttl`"),
            (options().xfetch(0.0), "`xfetch`"),
            (options().xfetch(f64::NAN), "`xfetch`"),
            (options().ttl(None).xfetch(1.0), "`ttl`"),
            (options().refresh_ahead(0.5).xfetch(1.0), "one of them"),
            (options().audit(1001), "`audit`"),
        ] {
            let error = wrong.check().expect_err("refused");
            assert!(error.is_config() && error.to_string().contains(names), "{error}");
        }
        for right in [options(), options().ttl(None), options().refresh_ahead(0.8), options().jitter(0.0)] {
            right.check().expect("fine");
        }
    }
}
