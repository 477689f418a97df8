//! How the values of one type become bytes, and back, without being changed by it.
//!
//! What a codec leaves out (`#[serde(skip)]`), rounds, or makes up when it is not there (a field of type `Option` that a later version of the
//! service has) would make a row from a tier another one than the same row from Postgres. So a value is put in only if its bytes make a value
//! that equals it; and one that is taken out must be written as the bytes that it was made of.

use std::{
    any::type_name,
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::seal;
use crate::{
    postgres::{built::BoxError, rows::panic_message},
    values::Codec,
};

/// What a tier needs to know of a type of values. Code of the user's, which may panic: that is an error like others.
pub(crate) struct Form<V> {
    /// Tells it from other types, and other codecs, in names of rows.
    pub(crate) id: String,
    encode: fn(&V) -> Result<Vec<u8>, BoxError>,
    decode: fn(&[u8]) -> Result<V, BoxError>,
    equal: fn(&V, &V) -> bool,
}

impl<V: PartialEq> Form<V> {
    pub(crate) fn of<C: Codec<V>>() -> Self {
        Self {
            id: seal::id(&format!("{} {}", type_name::<V>(), type_name::<C>())),
            encode: C::encode,
            decode: C::decode,
            equal: V::eq,
        }
    }
}

impl<V> Form<V> {
    /// The bytes of a value, if they stand for all of it.
    pub(crate) fn encode(&self, value: &V) -> Result<Vec<u8>, String> {
        caught(|| {
            let bytes = (self.encode)(value)?;
            let again = (self.decode)(&bytes)?;
            if !(self.equal)(value, &again) {
                return Err("what its bytes are decoded to does not equal it; is a field left out?".into());
            }
            if (self.encode)(&again)? != bytes {
                return Err("its bytes are others each time; is there a `HashMap` in it?".into());
            }
            Ok(bytes)
        })
    }

    /// The value of these bytes, if they are the bytes of that value.
    pub(crate) fn decode(&self, bytes: &[u8]) -> Result<V, String> {
        caught(|| {
            let value = (self.decode)(bytes)?;
            if (self.encode)(&value)? == bytes {
                Ok(value)
            } else {
                Err("it would be encoded in another way; was its type changed?".into())
            }
        })
    }
}

fn caught<T>(run: impl FnOnce() -> Result<T, BoxError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the codec panicked: {}", panic_message(&*panic))),
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::values::Json;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Before {
        name: String,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct After {
        name: String,
        email: Option<String>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Skips {
        name: String,
        #[serde(skip)]
        secret: String,
    }

    #[test]
    fn a_value_comes_back_as_it_was() {
        let form = Form::<After>::of::<Json>();
        let ada = After { name: "ada".into(), email: Some("ada@example.org".into()) };
        let bytes = form.encode(&ada).expect("bytes");
        assert_eq!(form.decode(&bytes), Ok(ada));
        assert_ne!(form.id, Form::<Before>::of::<Json>().id);
    }

    #[test]
    fn what_would_not_is_not_put_in() {
        let form = Form::<Skips>::of::<Json>();
        let encode = |secret: &str| form.encode(&Skips { name: "ada".into(), secret: secret.into() });
        assert!(encode("").is_ok());
        assert!(encode("x").expect_err("changed").contains("left out"));
        let maps = Form::<std::collections::HashMap<u32, u32>>::of::<Json>();
        assert!(maps.encode(&(0..1000).map(|n| (n, n)).collect()).expect_err("in another order").contains("each time"));
        assert!(Form::<f64>::of::<Json>().encode(&f64::NAN).is_err());
    }

    #[test]
    fn what_another_version_of_the_service_has_put_in_is_not_taken() {
        let ada = Before { name: "ada".into() };
        let old = Form::<Before>::of::<Json>().encode(&ada).expect("bytes");
        assert!(serde_json::from_slice::<After>(&old).is_ok_and(|after| after.email.is_none()), "which nobody said");
        assert!(Form::<After>::of::<Json>().decode(&old).expect_err("made up").contains("type changed"));
        let after = After { name: "ada".into(), email: None };
        let new = Form::<After>::of::<Json>().encode(&after).expect("bytes");
        assert!(Form::<Before>::of::<Json>().decode(&new).is_err());
    }

    #[test]
    fn a_codec_that_panics_is_an_error() {
        struct Panics;
        impl Codec<u8> for Panics {
            fn encode(_: &u8) -> Result<Vec<u8>, BoxError> {
                panic!("no")
            }
            fn decode(_: &[u8]) -> Result<u8, BoxError> {
                panic!("neither")
            }
        }
        let form = Form::<u8>::of::<Panics>();
        assert_eq!(form.encode(&1), Err("the codec panicked: no".into()));
        assert_eq!(form.decode(&[1]), Err("the codec panicked: neither".into()));
    }
}
