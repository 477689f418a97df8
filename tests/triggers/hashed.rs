//! Tables whose keys are secrets: hashes in place of keys, and who may make them.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::{Db, sorted};

const SESSIONS: &str = "create table t (token text primary key, v int)";

impl Db {
    /// What a message should say in place of this key, made without our code.
    async fn hash(&self, key: &str) -> String {
        let secret = self.client.query_one("select secret from rowcache.secret", &[]).await.expect("the secret");
        let mut hmac = Hmac::<Sha256>::new_from_slice(&secret.get::<_, Vec<u8>>(0)).expect("a key");
        hmac.update(key.as_bytes());
        hmac.finalize().into_bytes()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The words of messages that name these tokens.
    async fn hashes(&self, tokens: &[&str]) -> String {
        let mut words = Vec::new();
        for token in tokens {
            words.push(format!("#{}", self.hash(&format!("\"{token}\"")).await));
        }
        words.join(" ")
    }

    /// A role of this database, with the rights of everybody.
    async fn role(&self, name: &str) -> String {
        let role = format!("{name}_{}", self.db.name);
        let role = role[..role.len().min(63)].to_owned();
        self.run(&format!("create role {role}")).await;
        role
    }
}

pg_test! {
    async fn a_hash_is_the_hmac_of_the_text_that_would_be_sent(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create type mood as enum ('sad', 'it''s \"fine\"'); create domain code as varchar(300)").await;
        let controls: String = (1_u8..=0x7f).map(char::from).collect();
        let cases = [
            ("k smallint", "values (-7)"),
            ("k integer", "values (7)"),
            ("k bigint", "values (-9223372036854775808)"),
            ("k text", "values ('')"),
            ("k text", "values ($1)"),
            ("k varchar", "values ('Ünï \u{2028} \u{1f600} / {x}')"),
            ("k code", "values ($1)"),
            ("k uuid", "values ('A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid)"),
            ("k boolean", "values (true)"),
            ("k mood", "values ('it''s \"fine\"'::mood)"),
            ("k bytea", "values ('\\x00ff5c'::bytea)"),
            ("k timestamptz", "values ('2026-07-04 12:34:56.789+02'::timestamptz)"),
            ("k numeric", "values (1.500)"),
            ("k text, l int, m uuid", "values ('eu', 7, 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid)"),
            // As the variables of the function are named.
            ("inner_pad text, hmac int", "values ('x', 1)"),
        ];
        for level in ["statement", "row"] {
            for (number, (columns, values)) in cases.iter().enumerate() {
                let (clear, hashed) = (format!("c{number}_{level}"), format!("h{number}_{level}"));
                let key: Vec<_> = columns.split(", ").filter_map(|column| column.split(' ').next()).collect();
                let key = key.join(", ");
                db.run(&format!(
                    "create table {clear} ({columns}, outer_pad int, s int, keys int, primary key ({key}));
                     create table {hashed} ({columns}, outer_pad int, s int, keys int, primary key ({key}));
                     select rowcache.track('{clear}', level => '{level}');
                     select rowcache.track('{hashed}', level => '{level}', hash_keys => true);
                     set timezone = 'America/Caracas'; set datestyle = 'SQL, DMY'; set bytea_output = escape",
                )).await;
                let mut said = Vec::new();
                for table in [&clear, &hashed] {
                    let values = values.replace("$1", &format!("E'{}'", controls.replace('\\', "\\\\").replace('\'', "''")));
                    let told = db.told(&format!("insert into {table} ({key}) {values}")).await;
                    assert_eq!(told.messages.len(), 1, "{:?}", told.messages);
                    said.extend(told.messages);
                }
                let text = said[0].split_once(",\"k\":[").and_then(|(_, rest)| rest.strip_suffix("]}")).expect(&said[0]);
                let expected = format!(",\"h\":[\"{}\"]}}", db.hash(text).await);
                assert!(said[1].ends_with(&expected), "{columns} {values}: {} is not {expected} of {text}", said[1]);
            }
        }
    }

    async fn no_key_is_on_the_channel_whatever_is_done(test: Test) {
        for (level, table) in [
            ("statement", SESSIONS),
            ("row", SESSIONS),
            ("auto", "create table t (token text primary key, v int) partition by range (token);
                      create table t_a partition of t for values from (minvalue) to ('m'); create table t_z partition of t default"),
        ] {
            let mut db = Db::new(&test).await;
            db.run(table).await;
            db.run(&format!("select rowcache.track('t', level => '{level}', hash_keys => true)")).await;
            for (sql, tokens) in [
                ("insert into t values ('tokA', 1), ('tokB', 2)", &["tokA", "tokB"][..]),
                ("update t set v = 3 where token = 'tokA'", &["tokA"]),
                ("update t set token = 'atok' where token = 'tokB'", &["tokB", "atok"]),
                ("insert into t values ('tokA', 5) on conflict (token) do update set v = 5", &["tokA"]),
                ("merge into t using (values ('tokA'), ('tokC')) as s(token) on t.token = s.token
                  when matched then delete when not matched then insert values (s.token, 1)", &["tokA", "tokC"]),
                ("delete from t", &["atok", "tokC"]),
                ("insert into t values (repeat('tok', 800), 1)", &[&"tok".repeat(800)]),
            ] {
                let told = db.told(sql).await;
                assert_eq!(told.list(), sorted(&db.hashes(tokens).await), "{level}: {sql}\nas {:#?}", told.messages);
                assert!(told.messages.iter().all(|message| !message.contains("tok")), "{level}: {:#?}", told.messages);
            }
            for sql in ["insert into t select 'tok' || i from generate_series(1, 1000) i", "update t set v = 0", "delete from t"] {
                let told = db.told(sql).await;
                assert_eq!(told.words.len(), if sql.contains("insert") { 1000 } else { 1001 }, "{level}: {sql}");
                assert!(told.messages.iter().all(|message| !message.contains("tok")), "{level}: {sql}");
            }
            db.tells("truncate t", "*").await;
        }
    }

    async fn it_ignores_and_counts_as_with_clear_keys(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run(&format!(
                "{SESSIONS}; alter table t add w int; insert into t values ('a', 1, 1), ('b', 1, 1);
                 select rowcache.track('t', ignore => '{{w}}', max_keys => 5, level => '{level}', hash_keys => true)"
            )).await;
            db.tells("update t set w = 2", "").await;
            let a = db.hashes(&["a"]).await;
            db.tells("update t set v = 2 where token = 'a'", &a).await;
            let told = db.told("insert into t select i from generate_series(1, 100) i").await;
            assert!(told.words.contains("*"), "{:?}", told.messages);
        }
    }

    async fn nobody_gets_his_guesses_hashed(test: Test) {
        let mut db = Db::new(&test).await;
        let (owner, writer) = (db.role("owner").await, db.role("writer").await);
        db.run(&format!(
            "{SESSIONS}; alter table t owner to {owner}; grant all on t to {writer}; grant create on schema public to {writer}"
        )).await;
        let refusal = db.refuses("select rowcache.track('t', hash_keys => true)").await;
        assert_eq!(refusal.message, format!("{owner}, the owner of public.t, may not read the secret that hashes its keys"));
        assert_eq!(refusal.hint, format!("Run: grant select on rowcache.secret to {owner}"));
        // Its trigger function was public once.
        db.run(&format!("select rowcache.track('t'); grant select on rowcache.secret to {owner}; select rowcache.track('t', hash_keys => true)"))
            .await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());

        let tokens = db.hashes(&["a", "b"]).await;
        let function = db.text("select 'rowcache.changed_' || 't'::regclass::oid").await.expect("a name");
        db.run(&format!("set role {writer}; set search_path = pg_temp, public")).await;
        for (sql, denied) in [
            ("table rowcache.secret".to_owned(), "permission denied for table secret"),
            ("select rowcache.key_secret()".to_owned(), "permission denied for function key_secret"),
            (format!("create table public.mine (token text); create trigger x after insert on mine for each row execute function {function}()"),
             "permission denied for function rowcache.changed_"),
            (format!("create temp table changed_rows (token text); create trigger x after insert on public.t execute function {function}()"),
             "permission denied for function rowcache.changed_"),
        ] {
            let refusal = db.refuses(&sql).await;
            assert!(refusal.code == "42501" && refusal.message.starts_with(denied), "{sql}: {}", refusal.message);
        }
        // Who may write needs no right of ours, and rows of his own making are not taken for the statement's.
        db.tells("create temp table changed_rows (token text); insert into changed_rows values ('guess'); insert into public.t values ('a', 1);
                  update public.t set token = 'b'; delete from public.t", &tokens).await;
        db.run("reset role; reset search_path").await;

        for break_it in [
            format!("grant execute on function {function}() to public"),
            format!("grant execute on function {function}() to {writer}"),
            format!("alter function {function}() security invoker"),
            format!("alter function {function}() owner to current_user"),
        ] {
            db.run(&break_it).await;
            let problems = db.problems("t").await;
            assert!(problems.len() == 1 && problems[0].contains(", hash_keys => true)"), "{break_it}: {problems:?}");
            db.run("select rowcache.track('t', hash_keys => true)").await;
            assert_eq!(db.problems("t").await, Vec::<String>::new(), "{break_it}");
        }
        db.run(&format!("revoke select on rowcache.secret from {owner}")).await;
        let problems = db.problems("t").await;
        assert!(problems[0].ends_with(&format!("grant select on rowcache.secret to {owner}")), "{problems:?}");
        db.tells("insert into t values ('x', 1)", "*").await;
        db.run("select rowcache.track('t')").await;
        db.tells("insert into t values ('y', 1)", "\"y\"").await;
        assert_eq!(db.text(&format!("select has_function_privilege('public', '{function}()', 'execute')")).await.as_deref(), Some("true"));
        db.run(&format!("drop table t; drop owned by {owner}, {writer}; drop role {owner}, {writer}")).await;
    }

    async fn default_privileges_give_the_secret_to_nobody(test: Test) {
        let db = Db::new(&test).await;
        let reader = db.role("reader").await;
        db.run(&format!("alter default privileges grant select on tables to {reader}")).await;
        for file in rowcache::migrate::print().iter().rev().filter(|file| file.name.ends_with(".down.sql")) {
            db.run(&file.sql).await;
        }
        for file in rowcache::migrate::print().iter().filter(|file| file.name.ends_with(".up.sql")) {
            db.run(&file.sql).await;
        }
        db.run(&format!("set role {reader}")).await;
        assert_eq!(db.refuses("select secret from rowcache.secret").await.code, "42501");
        db.run(&format!("reset role; drop owned by {reader}; drop role {reader}")).await;
    }

    async fn a_new_secret_is_the_whole_table_until_it_is_tracked_again(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run(&format!("{SESSIONS}; select rowcache.track('t', level => '{level}', hash_keys => true)")).await;
            let before = db.hashes(&["a"]).await;
            db.tells("insert into t values ('a', 1)", &before).await;
            // Putting the migrations in place again is no new secret.
            db.run(&rowcache::migrate::print().iter().find(|file| file.name.starts_with("0002_tracking.up")).expect("it").sql).await;
            db.tells("delete from t", &before).await;
            db.run("update rowcache.secret set secret = default").await;
            let problems = db.problems("t").await;
            assert!(problems.len() == 1 && problems[0].starts_with("the secret has changed"), "{problems:?}");
            db.tells("insert into t values ('a', 1)", "*").await;
            db.run(&format!("select rowcache.track('t', level => '{level}', hash_keys => true)")).await;
            let after = db.hashes(&["a"]).await;
            assert_ne!(before, after);
            db.tells("delete from t", &after).await;
            db.run("delete from rowcache.secret").await;
            db.tells("insert into t values ('a', 1)", "*").await;
        }
    }

    async fn what_cannot_be_hashed_is_refused(test: Test) {
        let db = Db::new(&test).await;
        db.run(SESSIONS).await;
        for (call, message, hint) in [
            ("columns => '{v}', hash_keys => true", "the keys of public.t are to be hashed, and its columns {v} sent as they are", "Leave out"),
            ("hash_keys => null", "hash_keys is null, not true or false", "false"),
        ] {
            let refusal = db.refuses(&format!("select rowcache.track('t', {call})")).await;
            assert_eq!((refusal.code.as_str(), refusal.message.as_str()), ("22023", message));
            assert!(refusal.hint.contains(hint), "{}", refusal.hint);
        }
    }

    async fn the_option_is_listed_and_changing_it_is_a_new_fingerprint(test: Test) {
        let db = Db::new(&test).await;
        db.run(SESSIONS).await;
        let described = async || db.text("select secret is not null from rowcache.describe('t')").await;
        let listed = async || db.text("select hash_keys from rowcache.tracked").await;
        db.run("select rowcache.track('t')").await;
        let clear = db.fingerprint("public.t").await;
        assert_eq!((described().await.as_deref(), listed().await.as_deref()), (Some("false"), Some("false")));
        db.run("select rowcache.track('t', hash_keys => true)").await;
        let hashed = db.fingerprint("public.t").await;
        assert_ne!(clear, hashed);
        assert_eq!((described().await.as_deref(), listed().await.as_deref()), (Some("true"), Some("true")));
        db.run("select rowcache.track('t', hash_keys => true)").await;
        assert_eq!(db.fingerprint("public.t").await, hashed, "nothing to do");
        db.run("select rowcache.track('t')").await;
        assert_ne!(db.fingerprint("public.t").await, hashed);
    }
}
