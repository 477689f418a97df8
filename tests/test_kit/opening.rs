//! What can be opened, and what is said of what cannot.

use super::*;

#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
struct Order {
    user_id: i64,
    total: i64,
}

fn order(user_id: i64, total: i64) -> Order {
    Order { user_id, total }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there_is_an_error_that_says_what_to_do() {
    let (db, _) = ada();
    let node = db.node().await;
    let none = TableOptions::default;
    let errors = [
        node.table::<i64, User>("public.nobody").await.expect_err("not there"),
        node.table::<i32, User>(USERS).await.expect_err("other keys"),
        node.table::<i64, (i64,)>(USERS).await.expect_err("other values"),
        node.table_by::<String, User>("public.nobody", ["name"], none()).await.expect_err("no such table"),
    ];
    for (error, part) in errors.iter().zip(["Database::table(\"public.nobody\")", "i64", "User", "public.nobody"]) {
        assert!(error.is_table() && error.to_string().contains(part), "{error}");
    }
    let error = node.table_by::<String, User>(USERS, ["name"], none()).await.expect_err("is not sent");
    assert!(error.is_not_tracked() && error.to_string().contains("TestTable::by"), "{error}");
    let view = node.view("accounts").on(USERS, ["id"]);
    let error = view.open::<i64, i64, _>(|_, _| unreachable!()).await.expect_err("not there");
    assert!(error.is_table() && error.to_string().contains("Database::view(\"accounts\")"), "{error}");
}

#[test]
#[should_panic(expected = "public.users was made before, with keys of type i64")]
fn a_table_is_made_with_one_pair_of_types() {
    let (db, _) = ada();
    let _ = db.table::<i32, User>("users");
}

#[tokio::test(start_paused = true)]
async fn a_name_without_a_schema_is_one_of_public() {
    let (db, users) = ada();
    assert_eq!(db.table::<i64, User>("users").get(&42), Some(user("Ada")), "the same table");
    let node = db.node().await;
    let table: Table<i64, User> = node.table("users").await.expect("opens");
    assert_eq!((table.name(), users.name()), (USERS, USERS));
    read(&cached(&node).await).await;
    assert_eq!(held(&table).as_deref(), Some("Ada"), "the same cache");
}

#[tokio::test(start_paused = true)]
async fn rows_and_lists_by_other_columns() {
    let db = Database::new();
    let orders = db
        .table::<i64, Order>("public.orders")
        .by(["user_id"], |_, order| Some(order.user_id))
        .by(["user_id", "total"], |_, order| (order.total != 0).then_some((order.user_id, order.total)));
    orders.put_all([(1, order(42, 10)), (3, order(42, 30)), (2, order(42, 20)), (4, order(43, 0))]);
    let node = db.node().await;
    let none = TableOptions::default;
    let lists: Table<i64, Vec<Order>> = node.list_by("public.orders", ["user_id"], none()).await.expect("opens");
    let one: Table<i64, Order> = node.table_by("public.orders", ["user_id"], none()).await.expect("opens");
    let pair: Table<(i64, i64), Order> =
        node.table_by("public.orders", ["user_id", "total"], none()).await.expect("opens");
    let totals = async |user: i64| {
        let list = lists.get(&user).await.expect("can be read");
        list.map(|list| list.iter().map(|order| order.total).collect::<Vec<_>>())
    };
    assert_eq!(totals(42).await, Some(vec![10, 20, 30]), "in the order of their keys");
    assert_eq!((totals(43).await, totals(44).await), (Some(vec![0]), None));
    assert!(one.get(&42).await.is_err_and(|error| error.is_table()), "there are several");
    assert_eq!(one.get(&43).await.expect("can be read").expect("there is one").total, 0);
    assert!(pair.get(&(42, 20)).await.expect("can be read").is_some());
    assert!(pair.get(&(43, 0)).await.expect("can be read").is_none(), "one of its columns is NULL");

    // A row that moves evicts both lists that it is in, and no other.
    orders.update(&2, |order| order.user_id = 44).expect("is there");
    node.barrier().await.expect("a fence comes back");
    assert!(!lists.peek(&42).is_known() && !lists.peek(&44).is_known() && lists.peek(&43).is_known());
    assert!(!pair.peek(&(42, 20)).is_known() && pair.peek(&(43, 0)).is_known());
    assert_eq!((totals(42).await, totals(44).await), (Some(vec![10, 30]), Some(vec![20])));
    orders.remove(&2);
    node.barrier().await.expect("a fence comes back");
    assert_eq!(totals(44).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_view_returns_what_was_put() {
    let db = Database::new();
    let totals = db.view::<i64, i64>("totals");
    totals.put(42, 120);
    let (node, other) = (db.node().await, db.node().await);
    let open = async |node: &Node| {
        let view = node.view("totals").on("public.orders", ["user_id"]);
        view.open::<i64, i64, _>(|_, _| unreachable!("there is no Postgres")).await.expect("opens")
    };
    let (here, there) = (open(&node).await, open(&other).await);
    for view in [&here, &there] {
        assert_eq!(view.get(&42).await.expect("can be read").map(|total| *total), Some(120));
    }
    totals.put(42, 150);
    node.barrier().await.expect("a fence comes back");
    assert_eq!(here.get(&42).await.expect("can be read").map(|total| *total), Some(150));
    // Told by a node.
    other.barrier().await.expect("a fence comes back");
    there.get(&42).await.expect("can be read");
    here.invalidate(&42).await.expect("is sent");
    other.barrier().await.expect("a fence comes back");
    assert!(!there.peek(&42).is_known());
}

#[tokio::test(start_paused = true)]
async fn a_table_can_be_opened_with_several_types() {
    let (db, users) = ada();
    let users = users.also_as(|user| (user.name.clone(), 0_i64));
    let node = db.node().await;
    let pairs: Table<i64, (String, i64)> = node.table(USERS).await.expect("opens");
    let rows = cached(&node).await;
    assert_eq!(pairs.get(&42).await.expect("can be read").expect("is there").0, "Ada");
    read(&rows).await;
    users.put(42, user("Grace"));
    node.barrier().await.expect("a fence comes back");
    assert_eq!((pairs.peek(&42).is_known(), held(&rows)), (false, None), "both forget");
    assert_eq!(pairs.get(&42).await.expect("can be read").expect("is there").0, "Grace");
}

#[tokio::test(start_paused = true)]
async fn a_launched_node_waits_for_its_database() {
    let (db, _) = ada();
    db.stop();
    assert!(db.node_with(testing::config()).await.is_err_and(|error| error.is_unavailable()));
    let node = db.launch(testing::config()).expect("needs nobody");
    let table = cached(&node).await;
    assert!(table.get(&42).await.is_err_and(|error| error.is_unavailable()));
    let by_half_a_name: Table<i64, User> = node.table("users").await.expect("returns at once");
    db.start();
    table.until_open().await.expect("opens");
    node.until_coherent().await.expect("connects");
    assert_eq!(read(&table).await, "Ada");
    assert!(by_half_a_name.until_open().await.is_err_and(|error| error.is_config()), "as with Postgres");
}

#[tokio::test(start_paused = true)]
async fn transactions_are_refused() {
    let (db, _) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    let update = table.update(&42, |_| Box::pin(async { Ok::<_, rowcache::Error>(()) })).await.map(|_| ());
    let modify = table.modify(&42, |_, _| Box::pin(async { Ok::<_, rowcache::Error>(()) })).await.map(|_| ());
    for refused in [node.begin().await.map(|_| ()), update, modify] {
        let error = refused.expect_err("there are none");
        assert!(error.is_config() && error.to_string().contains("TestTable::put"), "{error}");
    }
    let mut config = testing::config();
    config.listen = false;
    assert!(db.node_with(config).await.is_err_and(|error| error.is_config()));
}
