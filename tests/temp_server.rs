//! The throw-away server itself: how it starts, stops and ends.

use rowcache::cli::temp_server::{Stop, TempServer};

async fn one(url: &str, sql: &str) -> Result<String, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    let driver = tokio::spawn(connection);
    let row = client.query_one(sql, &[]).await;
    driver.abort();
    Ok(row?.get(0))
}

#[tokio::test]
async fn data_and_port_survive_a_stop() {
    let mut server = TempServer::options().setting("track_commit_timestamp", "on").start().await.unwrap();
    let url = server.url("postgres");
    assert_eq!(one(&url, "show track_commit_timestamp").await.unwrap(), "on");
    one(&url, "with a as (select 1) select 'x'").await.unwrap();
    server.stop(Stop::Fast).await.unwrap();
    one(&url, "select 'x'").await.unwrap_err();
    server.start().await.unwrap();
    one(&url, "select 'x'").await.unwrap();
    server.restart(Stop::Immediate).await.unwrap();
    one(&url, "select 'x'").await.unwrap();
    let frozen = server.freeze().await.unwrap();
    drop(frozen);
    one(&url, "select 'x'").await.unwrap();
}
