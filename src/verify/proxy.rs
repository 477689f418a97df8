//! A TCP proxy in front of a server, to break the network on command.
//!
//! Bytes flow [`Up`](Direction::Up) to the server and [`Down`](Direction::Down) to the client. What happens to them is a
//! [`Flow`] per direction, for all connections ([`Proxy::set`]) or for one ([`Connection::set`]), changed at any time.
//! A change holds for bytes that the proxy has not read yet.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Whatever is waited for here takes no longer; what does is a fault of the machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// What happens to bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flow {
    /// They go through.
    Pass,
    /// Nothing is read: buffers fill up, nothing is lost, `Pass` lets all of it through.
    Stall,
    /// Everything is read and thrown away, the end of the stream too: a cable that was cut. Bytes are missing for good, so
    /// a stream that was in use cannot be used again afterwards.
    Swallow,
    /// Every piece arrives this much later; the next one waits for it.
    Delay(Duration),
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Close {
    /// In good order: both sides read the end of the stream.
    Fin,
    /// Abruptly: both sides get "connection reset".
    Rst,
}

/// A listening proxy. Dropping it resets all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Accepts connections; `None` while new ones are refused.
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Where connections to come go.
    upstream: Mutex<SocketAddr>,
    /// Up and down, for connections to come.
    flows: Mutex<[Flow; 2]>,
    /// All there ever were.
    connections: Mutex<Vec<Arc<Connection>>>,
}

impl Proxy {
    /// A proxy on a free port in front of the server on this port.
    pub async fn start(server_port: u16) -> Self {
        let upstream = (Ipv4Addr::LOCALHOST, server_port).into();
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream),
            flows: Mutex::new([Flow::Pass; 2]),
            connections: Mutex::default(),
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let acceptor = Some(tokio::spawn(accept(listener, Arc::clone(&shared))));
        Self { address, shared, acceptor }
    }

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The same URL, through this proxy.
    #[must_use]
    pub fn url(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("a URL");
        url.set_port(Some(self.port())).expect("a URL with a host");
        url.into()
    }

    /// Sets one direction of all connections, those to come included.
    pub fn set(&self, direction: Direction, flow: Flow) {
        self.shared.flows.lock().unwrap()[direction as usize] = flow;
        for connection in self.connections() {
            connection.set(direction, flow);
        }
    }

    /// Sets both directions of all connections, those to come included.
    pub fn set_both(&self, flow: Flow) {
        self.set(Direction::Up, flow);
        self.set(Direction::Down, flow);
    }

    /// Sends connections to come to the server on another port, as a changed DNS entry does.
    pub fn retarget(&self, server_port: u16) {
        *self.shared.upstream.lock().unwrap() = (Ipv4Addr::LOCALHOST, server_port).into();
    }

    /// The open connections, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.shared.connections.lock().unwrap().iter().filter(|connection| connection.is_open()).cloned().collect()
    }

    /// How many connections there have ever been.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.connections.lock().unwrap().len()
    }

    /// Ends all open connections.
    pub async fn close_all(&self, how: Close) {
        for connection in self.connections() {
            connection.close(how).await;
        }
    }

    /// From now on new connections are refused ("connection refused"), as by a machine without a server. Open ones stay.
    pub async fn refuse(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
            let _ = acceptor.await; // "cancelled", and the listening socket is closed
        }
    }

    /// Accepts new connections again, on the same port.
    pub async fn accept(&mut self) {
        if self.acceptor.is_none() {
            let listener = TcpListener::bind(self.address).await.expect("nobody has taken the port");
            self.acceptor = Some(tokio::spawn(accept(listener, Arc::clone(&self.shared))));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(acceptor) = &self.acceptor {
            acceptor.abort();
        }
        for connection in self.connections() {
            connection.order_close(Close::Rst);
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (client, _) = listener.accept().await.expect("accept");
        // The server's refusal must look like one: the client is reset, and no connection is counted.
        let upstream = *shared.upstream.lock().unwrap();
        let Ok(server) = TcpStream::connect(upstream).await else {
            let _ = client.set_zero_linger();
            continue;
        };
        {
            // Under the lock, or a `set` between these two lines would miss this connection.
            let mut connections = shared.connections.lock().unwrap();
            let [up, down] = *shared.flows.lock().unwrap();
            let (inject, injected) = mpsc::unbounded_channel();
            let connection = Arc::new(Connection {
                id: connections.len(),
                flows: [watch::Sender::new(up), watch::Sender::new(down)],
                bytes: Default::default(),
                order: watch::Sender::new(None),
                open: watch::Sender::new(true),
                greeting: Mutex::default(),
                inject,
                hidden: watch::Sender::new(0),
            });
            connections.push(Arc::clone(&connection));
            tokio::spawn(carry(client, server, Arc::clone(&connection), injected));
        };
    }
}

/// One connection through the proxy.
#[derive(Debug)]
pub struct Connection {
    /// Counts up from 0.
    pub id: usize,
    flows: [watch::Sender<Flow>; 2],
    bytes: [AtomicU64; 2],
    order: watch::Sender<Option<Close>>,
    open: watch::Sender<bool>,
    /// The first bytes up: the client says who it is.
    greeting: Mutex<Vec<u8>>,
    inject: mpsc::UnboundedSender<Vec<u8>>,
    /// Answers to hide from the client.
    hidden: watch::Sender<usize>,
}

/// As much of the first bytes is kept.
const GREETING_MAX: usize = 1024;

impl Connection {
    /// Whether the client's first bytes contain `part`, for instance of its `application_name`.
    pub fn greeted_with(&self, part: &str) -> bool {
        self.greeting.lock().unwrap().windows(part.len()).any(|bytes| bytes == part.as_bytes())
    }

    /// Has the server execute SQL in this session behind the client's back: neither the statement nor its answer passes
    /// the client, notifications do. Returns when the server has answered. The session must be idle.
    pub async fn execute(&self, sql: &str) {
        let mut query = vec![b'Q'];
        let length = 4 + sql.len() + 1;
        query.extend(u32::try_from(length).expect("a short statement").to_be_bytes());
        query.extend(sql.as_bytes());
        query.push(0);
        self.hidden.send_modify(|hidden| *hidden += 1);
        self.inject.send(query).expect("the connection is open");
        let answered =
            timeout(PATIENCE, async { self.hidden.subscribe().wait_for(|hidden| *hidden == 0).await.map(drop) });
        answered.await.expect("the server does not answer").expect("the sender is in `self`");
    }

    /// Sets one direction of this connection.
    pub fn set(&self, direction: Direction, flow: Flow) {
        self.flows[direction as usize].send_replace(flow);
    }

    /// How many bytes have been forwarded.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.bytes[direction as usize].load(Ordering::Relaxed)
    }

    /// Whether neither side has ended it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self.open.borrow()
    }

    /// Ends this connection; returns when both sides have been told.
    pub async fn close(&self, how: Close) {
        self.order_close(how);
        self.wait_closed().await;
    }

    /// Waits until the connection has ended, whoever ended it.
    pub async fn wait_closed(&self) {
        let closed = timeout(PATIENCE, async { self.open.subscribe().wait_for(|open| !open).await.map(|_| ()) }).await;
        closed.expect("the connection is still open").expect("the sender is in `self`");
    }

    fn order_close(&self, how: Close) {
        self.order.send_replace(Some(how));
    }

    fn mark_closed(&self) {
        self.open.send_replace(false);
    }
}

async fn carry(
    mut client: TcpStream,
    mut server: TcpStream,
    connection: Arc<Connection>,
    injected: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("set TCP_NODELAY"); // pieces pass as they come
    }
    let how = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let up = pump(from_client, to_server, &connection, Direction::Up, Some(injected));
        let down = pump(from_server, to_client, &connection, Direction::Down, None);
        let both = async { tokio::try_join!(up, down) };
        let mut order = connection.order.subscribe();
        tokio::select! {
            ordered = order.wait_for(Option::is_some) => ordered.expect("the sender is in `connection`").expect("checked"),
            ended = both => if ended.is_ok() { Close::Fin } else { Close::Rst },
        }
    };
    match how {
        Close::Rst => {
            let _ = client.set_zero_linger();
            let _ = server.set_zero_linger();
            drop((client, server));
            connection.mark_closed();
        }
        Close::Fin => {
            let _ = client.shutdown().await;
            let _ = server.shutdown().await;
            connection.mark_closed();
            // Closing a socket with unread bytes would reset it: read them, until the other side closes too.
            let rest = async { tokio::join!(drain(client), drain(server)) };
            let _ = timeout(PATIENCE, rest).await;
        }
    }
}

async fn drain(mut stream: TcpStream) {
    let mut nowhere = [0; 4096];
    while matches!(stream.read(&mut nowhere).await, Ok(1..)) {}
}

async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    connection: &Connection,
    direction: Direction,
    mut injected: Option<mpsc::UnboundedReceiver<Vec<u8>>>,
) -> io::Result<()> {
    const GONE: &str = "the sender lives as long as the connection";
    let mut flow = connection.flows[direction as usize].subscribe();
    let mut buffer = vec![0; 16 * 1024];
    let mut unsorted = Vec::new();
    loop {
        flow.wait_for(|flow| *flow != Flow::Stall).await.expect(GONE);
        let next_injected = async {
            match &mut injected {
                Some(injected) => injected.recv().await.expect(GONE),
                None => std::future::pending().await,
            }
        };
        let read = tokio::select! {
            biased;
            changed = flow.changed() => {
                changed.expect(GONE);
                continue;
            }
            query = next_injected => {
                to.write_all(&query).await?;
                continue;
            }
            read = from.read(&mut buffer) => read?,
        };
        if read == 0 {
            flow.wait_for(|flow| !matches!(flow, Flow::Stall | Flow::Swallow)).await.expect(GONE);
            return to.shutdown().await;
        }
        let current = *flow.borrow();
        match current {
            Flow::Swallow => continue,
            // Set while we read: then these bytes wait like those that come after them.
            Flow::Stall => drop(flow.wait_for(|flow| *flow != Flow::Stall).await.expect(GONE)),
            Flow::Delay(by) => sleep(by).await,
            Flow::Pass => {}
        }
        let piece = &buffer[..read];
        if direction == Direction::Up {
            let mut greeting = connection.greeting.lock().unwrap();
            let room = GREETING_MAX - greeting.len();
            greeting.extend(&piece[..room.min(read)]);
        } else if *connection.hidden.borrow() > 0 {
            unsorted.extend(piece);
            let shown = sort_out(&mut unsorted, &connection.hidden);
            to.write_all(&shown).await?;
            continue;
        }
        to.write_all(piece).await?;
        connection.bytes[direction as usize].fetch_add(u64::try_from(read).expect("usize fits u64"), Ordering::Relaxed);
    }
}

/// Takes whole messages of the server off `bytes`, and returns those that are not part of a hidden answer: notifications,
/// and what comes after the last `ReadyForQuery` that is hidden.
fn sort_out(bytes: &mut Vec<u8>, hidden: &watch::Sender<usize>) -> Vec<u8> {
    let mut shown = Vec::new();
    while *hidden.borrow() > 0 {
        let Some(length) = bytes.get(1..5) else { return shown };
        let end = 1 + u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
        if bytes.len() < end {
            return shown;
        }
        let message: Vec<_> = bytes.drain(..end).collect();
        match message[0] {
            b'A' => shown.extend(message),
            b'Z' => hidden.send_modify(|hidden| *hidden -= 1),
            _ => {}
        }
    }
    shown.append(bytes);
    shown
}
