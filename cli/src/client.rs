//! The way to the daemon: gRPC over its unix socket.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, anyhow, bail};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use skep_common::limits::MESSAGE_BYTES_MAX;
use skep_proto::containers_client::ContainersClient;
use skep_proto::control_client::ControlClient;
use skep_proto::machine_client::MachineClient;
use skep_proto::{GetRequest, ListRequest};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// Where the daemon listens unless `--host` or `SKEP_HOST` says otherwise.
pub(crate) const DEFAULT_HOST: &str = "unix:///run/skep/skep.sock";

/// A refusal of the daemon, in its words.
#[derive(Debug, thiserror::Error)]
#[error("Error response from daemon: {}", .0.message())]
pub(crate) struct Refusal(pub(crate) tonic::Status);

impl From<tonic::Status> for Refusal {
    fn from(status: tonic::Status) -> Self {
        Self(status)
    }
}

/// A connection to the daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    /// Why what the daemon answered may be old.
    stale: Arc<Mutex<String>>,
}

impl Client {
    /// Connects; the socket must exist and answer.
    pub(crate) async fn connect(host: &str) -> Result<Self> {
        let path: Arc<Path> = socket_path(host)?.into();
        let endpoint = Endpoint::from_static("http://skep.local");
        let connector = service_fn(move |_| {
            let path = Arc::clone(&path);
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
            match io_error(&error).map(std::io::Error::kind) {
                Some(std::io::ErrorKind::PermissionDenied) => {
                    anyhow!("permission denied at {host}: run as root")
                }
                _ => anyhow!(
                    "cannot reach the skep daemon at {host}: is it running? (systemctl start skep, or skep daemon)"
                ),
            }
        })?;
        Ok(Self { channel, stale: Arc::default() })
    }

    /// The product's API.
    pub(crate) fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// This node's containers.
    pub(crate) fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// This machine.
    pub(crate) fn machine(&self) -> MachineClient<Channel> {
        MachineClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The object of a kind that an id, a name or a unique prefix of an id means.
    pub(crate) async fn get<T: DeserializeOwned>(&self, kind: &str, reference: &str) -> Result<T> {
        let json = self.get_json(kind, reference).await?;
        serde_json::from_str(&json).with_context(|| format!("the daemon sent a broken {kind}"))
    }

    /// The same as JSON text.
    pub(crate) async fn get_json(&self, kind: &str, reference: &str) -> Result<String, Refusal> {
        let request = GetRequest { kind: kind.into(), reference: reference.into() };
        let document = self.control().get(request).await?.into_inner();
        self.note_stale(document.stale);
        Ok(document.json)
    }

    /// The objects that `request` selects.
    pub(crate) async fn list<T: DeserializeOwned>(&self, request: ListRequest) -> Result<Vec<T>> {
        let kind = request.kind.clone();
        let answer = self.control().list(request).await.map_err(Refusal)?.into_inner();
        self.note_stale(answer.stale);
        let documents = answer.json;
        documents
            .iter()
            .map(|json| serde_json::from_str(json))
            .collect::<Result<_, _>>()
            .with_context(|| format!("the daemon sent a broken {kind}"))
    }

    fn note_stale(&self, why: String) {
        if !why.is_empty() {
            *self.stale.lock().expect(NOT_POISONED) = why;
        }
    }

    /// Why what this client was told may be old, where it may.
    pub(crate) fn stale(&self) -> Option<String> {
        let why = self.stale.lock().expect(NOT_POISONED).clone();
        (!why.is_empty()).then_some(why)
    }

    /// All objects of a kind.
    pub(crate) async fn list_all<T: DeserializeOwned>(&self, kind: &str) -> Result<Vec<T>> {
        self.list(ListRequest { kind: kind.into(), ..Default::default() }).await
    }
}

const NOT_POISONED: &str = "nothing panics while it holds the sentence";

/// The cause in the operating system, if there is one.
fn io_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e std::io::Error> {
    std::iter::successors(Some(error), |error| error.source())
        .find_map(|error| error.downcast_ref::<std::io::Error>())
}

fn socket_path(host: &str) -> Result<PathBuf> {
    match host.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(path.into()),
        None if host.starts_with('/') => Ok(host.into()),
        _ => bail!(
            "invalid host {host:?}: write unix:// and the absolute path of the daemon's socket"
        ),
    }
}

/// Whether a failed call means that the object does not exist.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refusal>().is_some_and(|refusal| refusal.0.code() == tonic::Code::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for (host, path) in [
            ("unix:///run/skep/skep.sock", Some("/run/skep/skep.sock")),
            ("/tmp/s", Some("/tmp/s")),
            ("tcp://1.2.3.4:2377", None),
            ("unix://relative", None),
            ("", None),
        ] {
            assert_eq!(socket_path(host).ok(), path.map(PathBuf::from), "{host}");
        }
    }

    #[tokio::test]
    async fn an_absent_daemon_is_one_sentence() {
        let error = Client::connect("unix:///nonexistent/skep.sock").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot reach the skep daemon at unix:///nonexistent/skep.sock: is it running? \
             (systemctl start skep, or skep daemon)"
        );
    }
}
