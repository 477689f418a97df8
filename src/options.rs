//! Every knob of one table.

use std::{
    any::{Any, type_name},
    fmt,
    num::NonZeroU32,
    sync::Arc,
};

use crate::{
    audit,
    error::{Error, Kind, Result},
    freshness::Fallback,
    store::{Bounds, Weigh},
};

/// Options of one table. More will come; start from `Default`.
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
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            capacity: 100_000,
            bytes: None,
            weigher: None,
            absent_bytes: 4 << 20,
            not_found_max: None,
            fallback: Fallback::default(),
            refill: 0,
            audit: 0,
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

    /// With up to this many hits a second read again, to show that they were right.
    #[must_use]
    pub fn audit(mut self, a_second: u32) -> Self {
        self.audit = a_second;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::new(Kind::Config, message));
        if self.audit > audit::RATE_MAX {
            return wrong(format!("`audit` must be at most {} a second", audit::RATE_MAX));
        }
        if self.weigher.is_some() && self.bytes.is_none() {
            return wrong("a `weigher` weighs rows for `bytes`, which is not set".into());
        }
        Ok(())
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { rows: self.capacity, bytes: self.bytes, absent_bytes: self.absent_bytes }
    }

    /// How rows of this type are weighed.
    pub(crate) fn weigh<V: 'static>(&self) -> Result<Weigh<V>> {
        match (&self.weigher, self.bytes) {
            (_, None) => Ok(Weigh::One),
            (None, Some(_)) => Ok(Weigh::Received),
            (Some(erased), Some(_)) => match erased.it.downcast_ref::<Heap<V>>() {
                Some(heap) => Ok(Weigh::With(Arc::clone(heap))),
                None => Err(Error::new(
                    Kind::Config,
                    format!(
                        "the `weigher` is for values of type {}, and the table has {}",
                        erased.of,
                        type_name::<V>()
                    ),
                )),
            },
        }
    }
}

type Heap<V> = Arc<dyn Fn(&V) -> usize + Send + Sync>;

/// Something that depends on the type of values, in options that do not: a [`Heap`].
#[derive(Clone)]
struct Erased {
    of: &'static str,
    it: Arc<dyn Any + Send + Sync>,
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
    }
}
