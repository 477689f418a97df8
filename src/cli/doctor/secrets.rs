//! Which columns look like secrets, by their names and types. What triggers send is open: every role that may connect
//! may listen.

/// Types that hold a secret; a number that is called `email_id` is none.
const TYPES: [&str; 6] = ["text", "character varying", "character", "uuid", "bytea", "citext"];

/// Words of a column's name.
const WORDS: [&str; 29] = [
    "apikey",
    "auth",
    "bearer",
    "card",
    "cookie",
    "credential",
    "credentials",
    "email",
    "hash",
    "iban",
    "jwt",
    "mail",
    "mobile",
    "msisdn",
    "nonce",
    "otp",
    "passport",
    "passwd",
    "password",
    "phone",
    "pin",
    "pwd",
    "secret",
    "session",
    "sessionid",
    "sid",
    "ssn",
    "telephone",
    "token",
];

/// Words that say it side by side.
const PAIRS: [(&str, &str); 6] =
    [("access", "key"), ("api", "key"), ("private", "key"), ("e", "mail"), ("social", "security"), ("tax", "id")];

/// Whether a column of this name and type (as `format_type` prints it, without a length) may hold a secret.
pub(super) fn looks_secret(column: &str, of: &str) -> bool {
    let of = of.split('(').next().unwrap_or(of).trim();
    if !TYPES.contains(&of) {
        return false;
    }
    let words = words(column);
    // `tokens` and `emails` as well.
    let singular = |word: &String| word.strip_suffix('s').unwrap_or(word).to_owned();
    words.iter().any(|word| WORDS.contains(&&**word) || WORDS.contains(&&*singular(word)))
        || words.windows(2).any(|pair| PAIRS.contains(&(&*pair[0], &*pair[1])))
}

/// `apiKey_v2` as `api`, `key`, `v2`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for c in name.chars() {
        if !c.is_alphanumeric() || (c.is_uppercase() && was_lower) {
            words.push(String::new());
        }
        if c.is_alphanumeric() {
            words.last_mut().expect("never empty").extend(c.to_lowercase());
        }
        was_lower = c.is_lowercase();
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_types_together() {
        for (name, of) in [
            ("token", "text"),
            ("session_id", "uuid"),
            ("apiKey", "character varying(64)"),
            ("api_key", "text"),
            ("EMAIL", "text"),
            ("reset_tokens", "bytea"),
            ("customer_e_mail", "character varying"),
        ] {
            assert!(looks_secret(name, of), "{name} {of}");
        }
        for (name, of) in [
            ("id", "uuid"),
            ("email_id", "bigint"),
            ("tokenizer", "text"),
            ("country", "text"),
            ("key", "text"),
            ("sessions", "integer"),
            ("assessment", "text"),
        ] {
            assert!(!looks_secret(name, of), "{name} {of}");
        }
    }
}
