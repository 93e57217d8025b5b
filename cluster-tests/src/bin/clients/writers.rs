//! Writers: each sends one write after the other, and waits for its answer. They are divided among the addresses.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::try_join_all;
use nix::sys::resource::{UsageWho, getrusage};
use serde::Serialize;
use skep_proto::CreateServiceRequest;
use skep_proto::control_client::ControlClient;
use skep_runtime::clock::monotonic;
use skep_runtime::transport::{ChannelPool, Peer};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tonic::transport::Channel;

/// Bytes of a service's spec, and of a value.
const PAYLOAD_BYTES: usize = 255;
/// A machine under load may take this long to connect.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What all writers did together.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    /// Acknowledged writes.
    writes: usize,
    /// From the first write to the last acknowledgement.
    seconds: f64,
    /// Half of the writes took at most this long.
    median_seconds: f64,
    /// Of 100 writes, 99 took at most this long.
    p99_seconds: f64,
    /// Of the processors, by this program.
    processor_seconds: f64,
}

/// Whom the writers write to.
enum Target {
    Skep { pool: ChannelPool },
    Etcd,
}

/// A connection to it.
enum Connection {
    Skep(ControlClient<Channel>),
    Etcd { stream: BufReader<TcpStream>, host: String },
}

/// Creates services without tasks.
pub(crate) async fn to_skep(pool: ChannelPool, words: &[&str]) -> Result<()> {
    print(&write(Target::Skep { pool }, words).await?)
}

/// Puts values of the same size.
pub(crate) async fn to_etcd(words: &[&str]) -> Result<()> {
    print(&write(Target::Etcd, words).await?)
}

fn print(summary: &Summary) -> Result<()> {
    println!("{}", serde_json::to_string(summary)?);
    Ok(())
}

async fn write(target: Target, words: &[&str]) -> Result<Summary> {
    let [n_writers, seconds, addresses @ ..] = words else {
        bail!("WRITERS and SECONDS are missing")
    };
    let n_writers: usize = n_writers.parse().context("WRITERS is no number")?;
    let time: f64 = seconds.parse().context("SECONDS is no number")?;
    if addresses.is_empty() {
        bail!("no ADDRESS was given");
    }
    let connect = |number: usize| Connection::open(&target, addresses[number % addresses.len()]);
    let connections = try_join_all((0..n_writers).map(connect)).await?;
    let began = monotonic();
    let until = began + Duration::from_secs_f64(time);
    let used_before = processor_time()?;
    // Tasks of their own: both threads take part.
    let writing = connections.into_iter().enumerate().map(|(number, connection)| {
        let name = format!("w{}-{number}", std::process::id());
        spawn(connection.write_until(name, until))
    });
    let times: Vec<Vec<Duration>> =
        try_join_all(writing).await?.into_iter().collect::<Result<_>>()?;
    let seconds = (monotonic() - began).as_secs_f64();
    let mut times: Vec<Duration> = times.into_iter().flatten().collect();
    times.sort_unstable();
    let at = |share: f64| {
        let rank = (times.len() as f64 * share) as usize;
        times.get(rank.min(times.len().saturating_sub(1))).map_or(f64::NAN, Duration::as_secs_f64)
    };
    Ok(Summary {
        writes: times.len(),
        seconds,
        median_seconds: at(0.5),
        p99_seconds: at(0.99),
        processor_seconds: (processor_time()? - used_before).as_secs_f64(),
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "this program ends with its writers, which are all waited for"
)]
fn spawn<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    tokio::spawn(future)
}

/// What this program took of the processors.
fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("failed to read the processor time")?;
    let both = [usage.user_time(), usage.system_time()];
    Ok(both
        .iter()
        .map(|time| Duration::from_micros(time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64))
        .sum())
}

/// The spec of a service without tasks, with a label that gives it its size.
fn payload(name: &str) -> String {
    let start = format!(r#"{{"Name":"{name}","Labels":{{"padding":""#);
    let end = r#""},"TaskTemplate":{"ContainerSpec":{"Image":"none"}},"Mode":{"Replicated":{"Replicas":0}}}"#;
    let padding = PAYLOAD_BYTES.saturating_sub(start.len() + end.len());
    format!("{start}{:x<padding$}{end}", "")
}

impl Connection {
    /// Connects before the clock starts.
    async fn open(target: &Target, address: &str) -> Result<Self> {
        match target {
            Target::Skep { pool } => {
                Ok(Self::Skep(ControlClient::new(pool.channel(address, Peer::Manager))))
            }
            Target::Etcd => {
                let connecting =
                    tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address));
                let stream = connecting.await.context("no connection in time")?;
                let stream = stream.with_context(|| format!("failed to connect to {address}"))?;
                stream.set_nodelay(true).context("failed to set up the connection")?;
                Ok(Self::Etcd { stream: BufReader::new(stream), host: address.to_owned() })
            }
        }
    }

    /// Gives how long each write took.
    async fn write_until(mut self, name: String, until: Instant) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        for number in 0.. {
            let began = monotonic();
            if began >= until {
                break;
            }
            let name = format!("{name}-{number}");
            self.write(&name, payload(&name)).await?;
            times.push(monotonic() - began);
        }
        Ok(times)
    }

    async fn write(&mut self, name: &str, payload: String) -> Result<()> {
        match self {
            Self::Skep(client) => {
                let request = CreateServiceRequest { spec_json: payload };
                client.create_service(request).await.context("a service was not created")?;
                Ok(())
            }
            Self::Etcd { stream, host } => {
                let (key, value) = (STANDARD.encode(name), STANDARD.encode(payload));
                let body = format!(r#"{{"key":"{key}","value":"{value}"}}"#);
                let request = format!(
                    "POST /v3/kv/put HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
                     Content-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(request.as_bytes()).await.context("failed to send")?;
                read_answer(stream).await.context("a value was not put")
            }
        }
    }
}

/// Reads one answer of HTTP/1.1 to its end.
async fn read_answer(stream: &mut BufReader<TcpStream>) -> Result<()> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    if !line.starts_with("HTTP/1.1 200 ") {
        bail!("the answer is {:?}", line.trim_end());
    }
    let mut length = None;
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        let header = line.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = Some(value.trim().parse().context("the answer's length is no number")?);
        }
    }
    let mut body = vec![0; length.context("the answer has no length")?];
    stream.read_exact(&mut body).await?;
    Ok(())
}
