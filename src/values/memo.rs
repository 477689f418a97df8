//! Memoised functions whose values all nodes share.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use super::{
    SharedValues,
    codec::{Codec, Json},
    stored::SharedValue,
};
use crate::{error::Result, key::Key, postgres::built::BoxError};

type Calling<V> = Pin<Box<dyn Future<Output = Result<V, BoxError>> + Send>>;

/// A function whose values are shared by all nodes: made by [`SharedValues::memo`]. Cheap to clone.
pub struct SharedMemo<K: Key, V: Send + Sync + 'static, C: 'static = Json> {
    values: SharedValues<K, V, C>,
    function: Arc<dyn Fn(K) -> Calling<V> + Send + Sync>,
}

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> SharedValues<K, V, C> {
    /// The same values, with a function that computes what is missing: [`Node::memo`](crate::Node::memo), for all nodes.
    ///
    /// ```no_run
    /// # async fn ask_the_bank(currency: &str) -> std::io::Result<f64> { Ok(1.0) }
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// let rates = node.shared("rates").ttl(std::time::Duration::from_secs(60)).open().await?;
    /// let rates = rates.memo(|currency: String| async move { ask_the_bank(&currency).await });
    /// let rate: f64 = *rates.get(&"EUR".to_owned()).await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn memo<F, R, E>(&self, function: F) -> SharedMemo<K, V, C>
    where
        F: Fn(K) -> R + Send + Sync + 'static,
        R: Future<Output = Result<V, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let call = move |argument| -> Calling<V> {
            let calling = function(argument);
            Box::pin(async move { calling.await.map_err(Into::into) })
        };
        SharedMemo { values: self.clone(), function: Arc::new(call) }
    }
}

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> SharedMemo<K, V, C> {
    /// The value for this argument: what is shared, or else what the function returns, called on one node for all who ask.
    ///
    /// # Errors
    ///
    /// As of [`SharedValues::fetch_or_store`].
    ///
    /// # Cancel safety
    ///
    /// As of [`SharedValues::fetch_or_store`].
    #[inline]
    pub async fn get(&self, argument: &K) -> Result<SharedValue<V, C>> {
        if let Some(value) = self.values.try_get(argument) {
            return Ok(value);
        }
        let (function, of) = (Arc::clone(&self.function), argument.clone());
        Box::pin(self.values.fetch_or_store(argument, move || function(of))).await
    }

    /// The values that it is made of: to [delete](SharedValues::delete) one that is wrong.
    #[must_use]
    pub fn values(&self) -> &SharedValues<K, V, C> {
        &self.values
    }
}

impl<K: Key, V: Send + Sync + 'static, C: 'static> Clone for SharedMemo<K, V, C> {
    fn clone(&self) -> Self {
        Self { values: self.values.clone(), function: Arc::clone(&self.function) }
    }
}

impl<K: Key, V: Send + Sync + 'static, C: 'static> fmt::Debug for SharedMemo<K, V, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemo").field("values", &self.values).finish_non_exhaustive()
    }
}
