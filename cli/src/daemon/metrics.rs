//! Metrics of this node over HTTP, for a collector such as Prometheus, where the operator names an address.
//!
//! One page, `GET /metrics`, in the text format. It is made when it is asked for and at no other time.
//! Plain HTTP without any proof of who asks, so that the address is the operator's choice alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skep_runtime::TaskSet;
use skep_runtime::telemetry::Chain;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::machine::Machine;

/// Bytes of a request's head; a collector's has a few hundred.
const HEAD_LENGTH_MAX: usize = 8 << 10;
/// From the connection to the end of the answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Requests at once, each a file descriptor of the daemon; more wait in the backlog.
const REQUESTS_MAX: usize = 32;
/// How long to wait before accepting again when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the page at `address` until the tasks end.
pub(super) async fn serve(address: SocketAddr, machine: Machine, tasks: &TaskSet) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("failed to serve metrics at {address}: free it, or change metrics_addr")
    })?;
    let connections = tasks.clone();
    let permits = Arc::new(Semaphore::new(REQUESTS_MAX));
    tasks.spawn("metrics", async move {
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "failed to accept a request for metrics");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let machine = machine.clone();
            connections.spawn("metrics request", async move {
                // A collector that went away or is slow gets no answer.
                let _ = tokio::time::timeout(DEADLINE, answer(stream, &machine)).await;
                drop(permit);
            });
        }
    });
    Ok(())
}

async fn answer(mut stream: TcpStream, machine: &Machine) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD_LENGTH_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = match request_path(&head) {
        Some("/metrics") => match page(machine).await {
            Ok(text) => ("200 OK", text),
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "failed to read the metrics");
                ("500 Internal Server Error", format!("{}\n", Chain(&error)))
            }
        },
        Some(_) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        None => ("405 Method Not Allowed", "only GET is answered\n".to_owned()),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// The path of a GET request, without its query.
fn request_path(head: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\r').next()?).ok()?;
    let target = line.strip_prefix("GET ")?.split(' ').next()?;
    target.split('?').next()
}

async fn page(machine: &Machine) -> Result<String, skep_worker::net::Error> {
    let version = env!("CARGO_PKG_VERSION");
    let own = format!(
        "# HELP skep_info The version of the daemon.\n# TYPE skep_info gauge\nskep_info{{version=\"{version}\"}} 1\n"
    );
    match machine.node() {
        Some(node) => Ok(own + &node.metrics().await?),
        None => Ok(own),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_its_path() {
        for (head, expect) in [
            ("GET /metrics HTTP/1.1\r\nHost: n1\r\n\r\n", Some("/metrics")),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", Some("/metrics")),
            ("GET / HTTP/1.1\r\n\r\n", Some("/")),
            ("POST /metrics HTTP/1.1\r\n\r\n", None),
            ("\r\n\r\n", None),
        ] {
            assert_eq!(request_path(head.as_bytes()), expect, "{head:?}");
        }
    }
}
