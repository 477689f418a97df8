//! Tokens and snapshots, as text: what is printed is read, what is read says what it says, and nothing panics.

use std::collections::BTreeSet;

use arbitrary::Arbitrary;
use rowcache::{Token, fuzzing};

#[derive(Arbitrary, Debug)]
pub struct Input<'a> {
    token: (u64, u64),
    xmin: u64,
    xmax: u64,
    running: BTreeSet<u64>,
    xids: Vec<u64>,
    text: &'a str,
    /// Text of what tokens are made of, and a little more.
    like_a_token: Vec<u8>,
}

pub fn run(input: &Input<'_>) {
    let token = fuzzing::token(input.token.0, input.token.1);
    let text = token.to_string();
    assert_eq!(text.parse::<Token>().expect("a token"), token);
    assert!(text.len() <= 40 && text.bytes().all(|byte| b"0123456789abcdef.".contains(&byte)), "{text}");
    any_token(input.text);
    let alphabet = b"0123456789abcdefF.+- ";
    let like = input.like_a_token.iter().map(|n| char::from(alphabet[usize::from(*n) % alphabet.len()]));
    any_token(&format!("1.{}", like.collect::<String>()));

    // As Postgres makes them: what runs is between the two.
    let (xmin, xmax) = (input.xmin.min(input.xmax), input.xmin.max(input.xmax));
    let running: BTreeSet<u64> = input.running.iter().copied().filter(|xid| (xmin..xmax).contains(xid)).collect();
    let list: Vec<_> = running.iter().map(u64::to_string).collect();
    let text = format!("{xmin}:{xmax}:{}", list.join(","));
    let ends = [xmin.saturating_sub(1), xmin, xmax.saturating_sub(1), xmax];
    let xids: Vec<u64> = input.xids.iter().chain(&input.running).chain(&ends).copied().collect();
    let seen = fuzzing::seen(&text, &xids).unwrap_or_else(|| panic!("{text} is a snapshot"));
    for (xid, seen) in xids.iter().zip(seen) {
        assert_eq!(seen, *xid < xmax && !running.contains(xid), "{xid} in {text}");
    }
    any_snapshot(input.text, &xids);
}

/// Any text, given to a token's reader.
pub fn any_token(text: &str) {
    let Ok(token) = text.parse::<Token>() else { return };
    let parts: Vec<&str> = text.split('.').collect();
    let [version, incarnation, xid] = parts[..] else { panic!("{text} is read as {token}") };
    assert_eq!(
        (version, u64::from_str_radix(incarnation, 16), xid.parse()),
        ("1", Ok(fuzzing::token_parts(token).0), Ok(token.xid()))
    );
    assert!(!text.contains(['+', '-', ' ']), "{text:?} is read as {token}");
    assert_eq!(token.to_string().parse::<Token>().expect("a token"), token);
}

/// Any text, given to a snapshot's reader.
fn any_snapshot(text: &str, xids: &[u64]) {
    let Some(seen) = fuzzing::seen(text, xids) else { return };
    let xmax: u64 = text.split(':').nth(1).and_then(|xmax| xmax.parse().ok()).expect("three numbers");
    let xmin: u64 = text.split(':').next().and_then(|xmin| xmin.parse().ok()).expect("three numbers");
    for (xid, seen) in xids.iter().zip(seen) {
        assert!(!seen || *xid < xmax.max(xmin), "{xid} in {text}");
    }
}
