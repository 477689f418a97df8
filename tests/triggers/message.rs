//! The form of messages: canonical text, sizes, chunks, and the options that decide what is sent.

use super::{Db, numbers};

pg_test! {
    async fn canonical_text_whatever_the_session_has_set(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create type mood as enum ('sad', 'it''s \"fine\"'); create domain day as date; create domain amount as numeric(9, 3)")
            .await;
        let cases = [
            ("smallint", "-7", "-7"),
            ("integer", "7", "7"),
            ("bigint", "-9223372036854775808", "-9223372036854775808"),
            ("text", "", r#""""#),
            ("text", "a\"b\\c\u{1}d\u{e9}", r#""a\"b\\c\u0001dé""#),
            ("varchar(9)", "null", r#""null""#),
            ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", r#""a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11""#),
            ("boolean", "yes", r#""true""#),
            ("mood", "it's \"fine\"", r#""it's_\"fine\"""#),
            ("bytea", "\\x00ff5c", r#""00ff5c""#),
            ("date", "2000-01-01", r#""0""#),
            ("date", "1999-12-31", r#""-1""#),
            ("date", "-infinity", r#""-infinity""#),
            ("day", "2026-07-04", r#""9681""#),
            ("timestamp", "2000-01-01 00:00:00.000001", r#""1""#),
            ("timestamp", "294276-12-31 23:59:59.999999", r#""9223371331199999999""#),
            ("timestamp", "4714-11-24 00:00:00 BC", r#""-211813488000000000""#),
            ("timestamptz", "1999-12-31 23:00:00-01", r#""0""#),
            ("timestamptz(3)", "2026-07-04 12:34:56.789+02", r#""836476496789000""#),
            ("timestamptz", "infinity", r#""infinity""#),
            ("numeric", "1.500", r#""1.5""#),
            ("numeric", "1e30", r#""1000000000000000000000000000000""#),
            ("numeric", "NaN", r#""NaN""#),
            ("amount", "-0.100", r#""-0.1""#),
        ];
        let settings = [
            "set timezone = 'UTC'",
            "set timezone = 'America/Caracas'; set datestyle = 'SQL, DMY'; set bytea_output = escape; set extra_float_digits = -3;
             set intervalstyle = iso_8601; set standard_conforming_strings = off; set escape_string_warning = off;
             set quote_all_identifiers = on; set lc_numeric = 'C'; set array_nulls = off; set transform_null_equals = on",
        ];
        for level in ["statement", "row"] {
            for (number, (kind, value, expected)) in cases.iter().enumerate() {
                let table = format!("t{number}_{level}");
                db.run(&format!("create table {table} (k {kind} primary key); select rowcache.track('{table}', level => '{level}')"))
                    .await;
                for setting in settings {
                    db.run(setting).await;
                    // The value is a parameter: its text is then not subject to the settings for string constants.
                    let sql = format!("insert into {table} select ($1::text)::{kind}");
                    db.client.execute(&sql, &[value]).await.expect(&sql);
                    let told: Vec<_> = db.told_so_far().await.words.into_iter().collect();
                    db.run(setting).await;
                    db.run(&format!("delete from {table}")).await;
                    let told_again: Vec<_> = db.told_so_far().await.words.into_iter().collect();
                    let expected = format!("public.{table}:{expected}");
                    assert_eq!(told, [expected.as_str()], "{kind} {value} with {setting}");
                    assert_eq!(told_again, [expected.as_str()], "{kind} {value} with {setting}");
                    db.run("reset all").await;
                }
            }
        }
    }

    async fn a_hijacked_search_path_changes_nothing(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::with_table(&test, level).await;
            db.run(
                "create schema evil;
                 create function evil.pg_notify(text, text) returns void language sql as '';
                 create function evil.nothing(text, text) returns text language sql as 'select null::text';
                 create operator evil.|| (function = evil.nothing, leftarg = text, rightarg = text);
                 create function evil.never(bigint, integer) returns boolean language sql as 'select true';
                 create operator evil.> (function = evil.never, leftarg = bigint, rightarg = integer);
                 create operator evil.>= (function = evil.never, leftarg = bigint, rightarg = integer);
                 create function evil.never(integer, integer) returns boolean language sql as 'select false';
                 create operator evil.= (function = evil.never, leftarg = integer, rightarg = integer)",
            ).await;
            db.run("set search_path = evil, pg_catalog, public; create temporary table changed_rows (id int)").await;
            db.tells("insert into public.t values (6); delete from public.t where id operator(pg_catalog.=) 1", "1 6").await;
            db.tells("update public.t set id = 20 where id operator(pg_catalog.=) 2", "2 20").await;
            db.tells("truncate public.t", "*").await;
        }
    }

    async fn many_keys_are_cut_into_chunks_that_leave_none_out(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create table t (id text primary key, v int); select rowcache.track('t')").await;
        // At every length there is a number of rows where a message is just full.
        for (length, rows) in [(1, 4000), (2, 1600), (36, 199), (36, 200), (36, 201), (36, 10_000), (1000, 20), (3900, 9), (3990, 4)] {
            let key = format!("rpad(i::text || ' ', {length}, 'é')");
            let told = db.told(&format!("truncate t; insert into t select {key} from generate_series(1, {rows}) i on conflict do nothing"))
                .await;
            let (keys, all): (Vec<_>, Vec<_>) = told.words.iter().partition(|word| *word != "*");
            assert_eq!(all, ["*"], "the truncate");
            let expected = db.text("select coalesce(sum(octet_length(id)), 0) from t").await.expect("a sum");
            if length * 2 > 3950 {
                assert_eq!(keys.len(), 0, "keys of {length} characters, {rows} rows");
                continue;
            }
            let count = db.text("select count(*) from t").await.expect("a count");
            assert_eq!(keys.len().to_string(), count, "keys of {length} characters, {rows} rows");
            let bytes: usize = keys.iter().map(|key| key.len() - 2).sum();
            assert_eq!(bytes.to_string(), expected, "keys of {length} characters, {rows} rows");
        }
    }

    async fn chunks_are_well_filled(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        let told = db.told("insert into t select i from generate_series(100001, 110000) i").await;
        assert_eq!(told.words.len(), 10_000);
        // 10,000 keys of 7 bytes with their commas, 3,500 bytes in each.
        assert!((18..=21).contains(&told.messages.len()), "{} messages", told.messages.len());
        let longest = told.messages.iter().map(String::len).max().expect("some");
        assert!((3400..3700).contains(&longest), "{longest}");
        assert_eq!(db.told("insert into t select i from generate_series(6, 300) i").await.messages.len(), 1);
    }

    async fn every_length_of_key_around_the_limits(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run("create table t (id text, v text); create index on t using hash (id)").await;
            db.run(&format!("select rowcache.track('t', key => '{{id}}', columns => '{{v}}', level => '{level}')")).await;
            for length in (3880..4120).step_by(15).chain(7850..8010) {
                for sql in [
                    format!("insert into t values (repeat('k', {length}), 'v')"),
                    format!("insert into t values ('k', repeat('v', {length}))"),
                    format!("insert into t values (repeat('é', {length} / 4), repeat('\"', {length} / 4))"),
                    // An old and a new key in one message of the row trigger.
                    "update t set id = id || 'x', v = v || 'x'".to_owned(),
                    "delete from t".to_owned(),
                ] {
                    assert!(!db.told(&sql).await.words.is_empty(), "{length} {sql}");
                }
            }
            db.tells("insert into t values (repeat('k', 8000), 'v')", "*").await;
            db.tells("insert into t values ('a', 'v'), (repeat('k', 1000000), 'v'), ('b', null)",
                if level == "row" { "* \"a\" v=\"v\" \"b\"" } else { "*" }).await;
            db.tells("insert into t values (repeat('k', 10), repeat('\u{1}', 2000))", "*").await;
        }
    }

    async fn a_million_rows_are_one_message(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("insert into t select i from generate_series(6, 1000000) i").await;
        assert_eq!(db.told_so_far().await.messages.len(), 1);
        let told = db.told("update t set v = 1").await;
        assert_eq!((told.list().as_str(), told.messages.len()), ("*", 1));
    }

    async fn rows_above_max_keys_are_told_as_the_whole_table(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("select rowcache.track('t', max_keys => 3)").await;
        db.tells("update t set v = 1 where id <= 3", "1 2 3").await;
        db.tells("update t set v = 1 where id <= 4", "*").await;
        db.tells("begin; delete from t where id <= 2; delete from t where id <= 5; commit", "1 2 3 4 5").await;
        db.tells("insert into t select i from generate_series(6, 8) i", "6 7 8").await;
        db.tells("insert into t select i from generate_series(10, 13) i", "*").await;
    }

    async fn row_triggers_count_the_rows_of_the_transaction(test: Test) {
        let mut db = Db::with_table(&test, "row").await;
        db.run("select rowcache.track('t', max_keys => 3, level => 'row')").await;
        db.tells("update t set v = 1 where id <= 3", "1 2 3").await;
        let told = db.told("update t set v = 1").await;
        assert!(told.words.contains("*") && told.words.len() == 4 && told.messages.len() == 4, "{:#?}", told.messages);
        // What is rolled back is not counted.
        db.tells("begin; savepoint s; update t set v = 1; rollback to s; update t set v = 1 where id > 3; commit", "4 5").await;
        // What the session claims does no harm.
        let oid = db.text("'t'::regclass::oid").await.expect("an oid");
        for claim in ["abc", "-5", "9999999999999", "", "5"] {
            db.run(&format!("set rowcache.rows_{oid} = '{claim}'")).await;
            assert!(!db.told("update t set v = 1 where id = 1").await.words.is_empty(), "{claim}");
        }
    }

    async fn moved_keys_are_few_messages_however_many_rows(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("select rowcache.track('t', max_keys => 100)").await;
        db.run("insert into t select i from generate_series(6, 20000) i").await;
        db.told_so_far().await;
        let told = db.told("update t set id = -id").await;
        assert!(told.words.contains("*") && told.messages.len() <= 101, "{} messages", told.messages.len());
    }

    async fn ignored_columns_do_not_tell(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run("create table t (id int primary key, seen timestamptz, n numeric, j json, p point, s text)").await;
            db.run("insert into t select i, now(), 1.0, '{}', '(0,0)', 's' from generate_series(1, 5) i").await;
            db.run(&format!("select rowcache.track('t', ignore => '{{seen}}', level => '{level}')")).await;
            db.tells("update t set seen = clock_timestamp()", "").await;
            db.tells("update t set s = s, seen = null", "").await;
            db.tells("update t set seen = now(), s = case when id = 3 then 'x' else s end", "3").await;
            db.tells("update t set s = null where id = 3", "3").await;
            db.tells("update t set n = 1.00 where id = 1", "1").await;
            db.tells("update t set j = '{ }' where id = 2", "2").await;
            db.tells("update t set p = '(0,1e-12)' where id = 4", "4").await;
            db.tells("update t set id = 10 where id = 5", "5 10").await;
            db.tells("update t set id = 20, seen = now() where id = 10; delete from t where id = 20; insert into t values (30)", "10 20 30")
                .await;
        }
    }

    async fn ignoring_columns_is_not_quadratic(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("select rowcache.track('t', ignore => '{w}')").await;
        // The plan is made for one row; a nested loop over two times 50,000 would take minutes.
        db.run("set statement_timeout = '20s'").await;
        db.tells("update t set w = 1 where id = 1", "").await;
        db.run("insert into t select i from generate_series(6, 50000) i").await;
        db.told_so_far().await;
        db.tells("update t set w = 2", "").await;
        db.tells("update t set w = 3, v = 1 where id = 40000", "40000").await;
    }

    async fn ignoring_keeps_chunks_and_max_keys(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("select rowcache.track('t', ignore => '{w}', max_keys => 3000)").await;
        db.run("insert into t select i from generate_series(6, 6000) i").await;
        db.told_so_far().await;
        db.tells("update t set w = 1, v = case when id <= 3000 then 1 else v end", &numbers(1..=3000)).await;
        db.tells("update t set w = 1, v = case when id <= 3001 then 2 else v end", "*").await;
    }

    async fn further_columns_are_sent_old_and_new(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run("create table t (id int primary key, email text, team uuid, note text)").await;
            db.run(&format!("select rowcache.track('t', columns => '{{email,team}}', level => '{level}')")).await;
            let team = "00000000-0000-0000-0000-000000000001";
            db.tells(&format!("insert into t values (1, 'a', null), (2, null, '{team}')"), &format!("1 2 email=\"a\" team=\"{team}\""))
                .await;
            db.tells("update t set email = 'b' where id = 1", "1 email=\"a\" email=\"b\"").await;
            db.tells("update t set note = 'n' where id = 1", "1 email=\"b\"").await;
            db.tells("update t set team = null where id = 2", &format!("2 team=\"{team}\"")).await;
            db.tells("update t set id = 3 where id = 1", "1 3 email=\"b\"").await;
            db.tells("delete from t", "2 3 email=\"b\"").await;
        }
    }

    async fn chunks_of_further_columns_leave_none_out(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create table t (id int primary key, email text, team int); select rowcache.track('t', columns => '{email,team}')").await;
        let told = db.told("insert into t select i, 'person' || i, i % 50 from generate_series(1, 5000) i").await;
        assert_eq!(told.words.len(), 5000 + 5000 + 50);
        assert!(told.messages.len() > 20);
        assert_eq!(told.messages.iter().filter(|message| !message.contains(r#""team":["#)).count(), 0);
    }

    async fn rows_without_a_key_tell_their_further_columns(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            db.run("create table t (a int, b int, owner int)").await;
            db.run(&format!("select rowcache.track('t', key => '{{a,b}}', columns => '{{owner}}', level => '{level}')")).await;
            db.tells("insert into t values (1, null, 7), (2, 2, null), (null, null, null)", "owner=7 [2,2]").await;
            db.tells("update t set b = 1 where a = 1", "[1,1] owner=7").await;
            db.tells("update t set b = null where a = 1", "[1,1] owner=7").await;
            db.tells("delete from t where a is null", "").await;
            // Also where they are so many that they are cut into chunks.
            let told = db.told("insert into t select i, nullif(i % 2, 0), 1000000 + i from generate_series(1, 2000) i").await;
            assert!(told.messages.len() > 5);
            assert_eq!(told.words.len(), 1000 + 2000);
        }
    }

    async fn names_that_need_quotes(test: Test) {
        for level in ["statement", "row"] {
            let mut db = Db::new(&test).await;
            let table = r#""My Schema"."Weird \ ""T"" %s é""#;
            db.run(&format!(
                r#"create schema "My Schema";
                   create table {table} ("K 1%I" int, "it's %1$s" text, "c""\" text, "old" int, primary key ("it's %1$s", "K 1%I"));
                   select rowcache.track('{table}', columns => array['c"\'], ignore => '{{old}}', level => '{level}')"#,
            )).await;
            for setting in ["set standard_conforming_strings = on", "set standard_conforming_strings = off"] {
                db.run(setting).await;
                db.tells(&format!("insert into {table} values (1, 'a', 'c')"), &words(table, r#"["a",1] c"\="c""#)).await;
                db.tells(&format!(r#"update {table} set "old" = 1"#), "").await;
                db.tells(&format!(r#"update {table} set "c""\" = 'd'"#), &words(table, r#"["a",1] c"\="c" c"\="d""#)).await;
                db.tells(&format!(r#"update {table} set "K 1%I" = 2"#), &words(table, r#"["a",1] ["a",2] c"\="d""#)).await;
                db.tells(&format!("delete from {table}"), &words(table, r#"["a",2] c"\="d""#)).await;
                db.tells(&format!("truncate {table}"), &words(table, "*")).await;
            }
            db.run("reset all").await;
            assert_eq!(db.problems(table).await, Vec::<String>::new());
            let relation = db.client.query_one("select relation from rowcache.tracked", &[]).await.expect("tracked");
            assert_eq!(relation.get::<_, &str>(0), table);
        }
    }
}

/// The words of a table with spaces in its name, as `Db::tells` splits them.
fn words(table: &str, list: &str) -> String {
    list.split(' ').map(|word| format!("{}:{word}", table.replace(' ', "_"))).collect::<Vec<_>>().join(" ")
}
