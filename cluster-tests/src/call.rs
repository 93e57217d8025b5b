//! Calls between nodes as strangers could make them: with whatever certificate, to whatever method.

use crate::lab::Lab;

/// Where a node keeps its certificate and key.
pub const CERTIFICATES: &str = "/var/lib/skep/certificates/swarm-node";

/// What a call sends.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    printf: &'static str,
    curl: &'static str,
}

impl Message {
    /// gRPC's form of a message without fields.
    pub const EMPTY: Self = Self { printf: "\\0\\0\\0\\0\\0", curl: "--data-binary @-" };
    /// No message at all: who may not call gets the same answer, and curl 7.88 takes it for an error
    /// when a server answers before it has read what was sent.
    pub const NONE: Self = Self { printf: "", curl: "" };
}

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// From where.
    pub node: &'a str,
    /// Path of the certificate, and of its key, without the endings `.crt` and `.key`.
    pub identity: Option<&'a str>,
}

/// What a server says of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The gRPC status.
    pub code: String,
    /// Its sentence.
    pub message: String,
}

/// Calls a method, such as `Control/List`, at a node's port.
///
/// Gives the answer, or what curl said where the connection itself was refused.
#[track_caller]
pub fn call(
    lab: &Lab,
    caller: Caller<'_>,
    to: &str,
    method: &str,
    message: Message,
) -> Result<Answer, String> {
    let url = format!("https://{}:2377/skep.v1.{method}", lab.node(to).address());
    let identity = caller.identity.map(|path| format!("--cert {path}.crt --key {path}.key"));
    // The server's certificate is not what is tested here.
    let script = format!(
        "printf '{}' | curl -sS --insecure --http2 --max-time 20 {} --request POST \
         -H 'content-type: application/grpc' -H 'te: trailers' {} \
         --dump-header - --output /dev/null {url}",
        message.printf,
        identity.unwrap_or_default(),
        message.curl
    );
    let output = lab.node(caller.node).exec(&["sh", "-c", &script]);
    let field = |name: &str| {
        let value = output.stdout.lines().find_map(|line| line.strip_prefix(name));
        value.map(|value| value.trim().replace("%20", " "))
    };
    let code = field("grpc-status: ");
    assert_eq!(code.is_some(), output.status.success(), "refused, or answered: {output}");
    let message = field("grpc-message: ").unwrap_or_default();
    code.map(|code| Answer { code, message }).ok_or_else(|| output.to_string())
}
