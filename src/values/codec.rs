//! How values become bytes.

use serde::{Serialize, de::DeserializeOwned};

use crate::postgres::built::BoxError;

/// How the values of [`SharedValues`](crate::SharedValues) are written into their table, and read from it.
///
/// All nodes must agree. What cannot be decoded counts as not there, and is computed and stored anew: so a change of the
/// type costs each value one computation. While nodes of both kinds run, each undoes what the other has done; a new name for
/// the values avoids that.
///
/// ```
/// use rowcache::{BoxError, Codec};
///
/// /// Text as it is.
/// struct Plain;
///
/// impl Codec<String> for Plain {
///     fn encode(value: &String) -> Result<Vec<u8>, BoxError> {
///         Ok(value.clone().into_bytes())
///     }
///
///     fn decode(bytes: &[u8]) -> Result<String, BoxError> {
///         Ok(std::str::from_utf8(bytes)?.to_owned())
///     }
/// }
/// ```
pub trait Codec<V>: Send + Sync + 'static {
    /// The bytes of a value.
    ///
    /// # Errors
    ///
    /// If it has none: it is not stored then.
    fn encode(value: &V) -> Result<Vec<u8>, BoxError>;

    /// The value of these bytes.
    ///
    /// # Errors
    ///
    /// If they are of no value.
    fn decode(bytes: &[u8]) -> Result<V, BoxError>;
}

/// JSON: what `psql` shows is readable.
#[derive(Clone, Copy, Debug)]
pub enum Json {}

impl<V: Serialize + DeserializeOwned> Codec<V> for Json {
    fn encode(value: &V) -> Result<Vec<u8>, BoxError> {
        Ok(serde_json::to_vec(value)?)
    }

    fn decode(bytes: &[u8]) -> Result<V, BoxError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// Bytes as they are: images, or what you have encoded yourself.
#[derive(Clone, Copy, Debug)]
pub enum Raw {}

impl<V: From<Vec<u8>> + AsRef<[u8]>> Codec<V> for Raw {
    fn encode(value: &V) -> Result<Vec<u8>, BoxError> {
        Ok(value.as_ref().to_vec())
    }

    fn decode(bytes: &[u8]) -> Result<V, BoxError> {
        Ok(bytes.to_vec().into())
    }
}
