//! A web service that looks up the caller of every request, in the cache.
//!
//! A token (JWT, HS256) says who the caller claims to be; whether that account may still be used stands in the database.
//! A service that trusts the token alone lets a disabled account in until the token expires; one that asks Postgres
//! every time pays a round trip for each request. Here the middleware reads the account through the cache, and an
//! UPDATE from anywhere counts from the next request on.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /login` with `{"account":1}` | `{"token":"…"}`; 401 if there is no such account, or it is disabled |
//! | `GET /me` with `authorization: Bearer …` | the account; 401 without a valid token, 403 once the account is disabled |
//! | any, when Postgres has to be asked and cannot answer | 503 with `retry-after: 1` |
//!
//! `/login` takes anybody's word for who they are: a real one asks for a password first.
//!
//! It needs a database with our schema and one tracked table. With `docker compose up -d --wait postgres`:
//!
//! ```text
//! export DATABASE_URL=postgres://postgres:postgres@localhost:5432/postgres
//! cargo run --features cli -- migrate up
//! psql "$DATABASE_URL" -c "create table accounts (id bigint primary key, name text not null, active boolean not null)"
//! psql "$DATABASE_URL" -c "insert into accounts values (1, 'Ada', true)"
//! cargo run --features cli -- track public.accounts
//! JWT_SECRET=$(head -c 32 /dev/urandom | base64) cargo run --example authenticated_service
//! ```
//!
//! Then, in another terminal:
//!
//! ```text
//! token=$(curl -s localhost:3000/login -H 'content-type: application/json' -d '{"account":1}' | cut -d'"' -f4)
//! curl -i localhost:3000/me -H "authorization: Bearer $token"                         # 200
//! psql "$DATABASE_URL" -c "update accounts set active = false where id = 1"
//! curl -i localhost:3000/me -H "authorization: Bearer $token"                         # 403
//! psql "$DATABASE_URL" -c "update accounts set active = true where id = 1"
//! curl -i localhost:3000/me -H "authorization: Bearer $token"                         # 200
//! ```

use std::{
    env,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json, Router,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rowcache::{Cached, Config, Node, Table};
use serde::{Deserialize, Serialize};

/// A row of `public.accounts`.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Account {
    id: i64,
    name: String,
    active: bool,
}

/// What a token says.
#[derive(Debug, Deserialize, Serialize)]
struct Claims {
    /// The account.
    sub: String,
    /// When the token expires, in seconds since 1970.
    exp: u64,
}

/// How long a token is good for. It can be long: a disabled account is refused all the same.
const TOKEN_LIFETIME: Duration = Duration::from_hours(24);

#[derive(Clone)]
struct Service {
    accounts: Table<i64, Account>,
    keys: Arc<Keys>,
}

struct Keys {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

/// Why a request is refused.
enum Refusal {
    /// Nobody has said who is calling, or nobody believes it.
    Unauthorized,
    /// The account was disabled.
    Disabled,
    /// Postgres had to be asked, and could not answer.
    Unavailable,
    /// The table does not hold what this program expects, for instance.
    Broken,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")]).into_response(),
            Self::Disabled => (StatusCode::FORBIDDEN, "this account is disabled\n").into_response(),
            Self::Unavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], "the database does not answer\n")
                    .into_response()
            }
            Self::Broken => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    }
}

impl From<rowcache::Error> for Refusal {
    fn from(error: rowcache::Error) -> Self {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        eprintln!("{error}{cause}");
        if error.is_unavailable() || error.is_timeout() || error.is_closed() { Self::Unavailable } else { Self::Broken }
    }
}

impl Service {
    /// The account, if it may be used.
    async fn account(&self, id: i64) -> Result<Cached<Account>, Refusal> {
        match self.accounts.get(&id).await? {
            Some(account) if account.active => Ok(account),
            Some(_) => Err(Refusal::Disabled),
            None => Err(Refusal::Unauthorized),
        }
    }
}

#[derive(Deserialize)]
struct Login {
    account: i64,
}

#[derive(Serialize)]
struct Token {
    token: String,
}

async fn login(State(service): State<Service>, Json(login): Json<Login>) -> Result<Json<Token>, Refusal> {
    let account = service.account(login.account).await.map_err(|refusal| match refusal {
        // Who cannot log in is not told why.
        Refusal::Disabled => Refusal::Unauthorized,
        other => other,
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set to a time after 1970");
    let claims = Claims { sub: account.id.to_string(), exp: (now + TOKEN_LIFETIME).as_secs() };
    let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &service.keys.encoding);
    Ok(Json(Token { token: token.map_err(|_| Refusal::Broken)? }))
}

/// Lets a request through if its token is good and its account may be used.
async fn authenticate(State(service): State<Service>, mut request: Request, next: Next) -> Result<Response, Refusal> {
    let account = service.account(claimed(&request, &service.keys).ok_or(Refusal::Unauthorized)?).await?;
    request.extensions_mut().insert(account);
    Ok(next.run(request).await)
}

/// The account that a request's token names, if the token is one of ours and has not expired.
fn claimed(request: &Request, keys: &Keys) -> Option<i64> {
    let token = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
    let token = jsonwebtoken::decode::<Claims>(token, &keys.decoding, &Validation::new(Algorithm::HS256)).ok()?;
    token.claims.sub.parse().ok()
}

async fn me(Extension(account): Extension<Cached<Account>>) -> Response {
    Json(&*account).into_response()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL")?;
    let secret = env::var("JWT_SECRET").map_err(|_| "set JWT_SECRET to 32 random bytes or more")?;
    if secret.len() < 32 {
        return Err("JWT_SECRET is shorter than 32 bytes: it could be guessed".into());
    }
    let listen = env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".into());

    let mut config = Config::from_url(&url)?;
    // Nobody waits for a page for longer than this, and a request without an answer is better refused.
    config.load_timeout = Duration::from_secs(1);
    let node = Node::start(config).await?;
    let keys = Keys {
        encoding: EncodingKey::from_secret(secret.as_bytes()),
        decoding: DecodingKey::from_secret(secret.as_bytes()),
    };
    let service = Service { accounts: node.table("public.accounts").await?, keys: Arc::new(keys) };
    let app = Router::new()
        .route("/me", get(me))
        .route_layer(middleware::from_fn_with_state(service.clone(), authenticate))
        .route("/login", post(login))
        .with_state(service);

    let listener = tokio::net::TcpListener::bind(&listen).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let stop = async { tokio::signal::ctrl_c().await.expect("the signal can be waited for") };
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    node.shutdown().await;
    Ok(())
}
