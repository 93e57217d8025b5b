//! Programs that forward connections in user space, to compare with: HAProxy and nginx.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use skep_cluster_tests::Running;

use super::place::Place;
use super::program;

/// Where Debian, and others, have what nginx loads for streams; elsewhere it is built in.
const STREAM_MODULES: [&str; 2] = [
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "/usr/lib64/nginx/modules/ngx_stream_module.so",
];

/// A program that forwards connections as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Relay {
    Haproxy,
    Nginx,
}

impl Relay {
    pub(crate) const ALL: [Self; 2] = [Self::Haproxy, Self::Nginx];

    /// Its program's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    fn packages(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx-light libnginx-mod-stream",
        }
    }

    /// The port that it listens on.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Haproxy => 9080,
            Self::Nginx => 9081,
        }
    }

    /// Starts it at `place`, on the address `own`; says why where it cannot run.
    pub(crate) fn start(
        self,
        place: &Place<'_>,
        own: Ipv4Addr,
        target: Ipv4Addr,
        dir: &Path,
    ) -> Option<Running> {
        let (name, packages) = (self.name(), self.packages());
        let Some(program) = program(name) else {
            println!("not measured: {name} is not installed (apt-get install {packages})");
            return None;
        };
        let file = dir.join(format!("{name}.conf"));
        fs::write(&file, self.config(own, target, dir)).expect("write the configuration");
        let (program, file) = (program.display().to_string(), file.display().to_string());
        let (check, run): (&[&str], &[&str]) = match self {
            Self::Haproxy => {
                (&[&program, "-q", "-c", "-f", &file], &[&program, "-q", "-db", "-f", &file])
            }
            Self::Nginx => (
                &[&program, "-t", "-q", "-e", "stderr", "-c", &file],
                &[&program, "-e", "stderr", "-c", &file],
            ),
        };
        let checked = place.exec(check);
        if !checked.status.success() {
            println!("not measured: {name} refuses its configuration: {}", checked.stderr.trim());
            return None;
        }
        Some(place.start(run))
    }

    /// Each takes as many threads or processes as there are cores.
    fn config(self, own: Ipv4Addr, target: Ipv4Addr, dir: &Path) -> String {
        let port = self.port();
        match self {
            Self::Haproxy => format!(
                "global\n  maxconn 4096\n\
                 defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
                 listen bench\n  bind {own}:{port}\n  server task {target}:8080\n"
            ),
            Self::Nginx => {
                let module = STREAM_MODULES.iter().find(|module| Path::new(module).is_file());
                let load = module.map(|module| format!("load_module {module};\n"));
                format!(
                    "{}user root;\nworker_processes auto;\ndaemon off;\npid {}/nginx.pid;\n\
                     events {{ worker_connections 4096; }}\n\
                     stream {{ server {{ listen {own}:{port}; proxy_pass {target}:8080; \
                     proxy_connect_timeout 5s; proxy_timeout 60s; }} }}\n",
                    load.unwrap_or_default(),
                    dir.display()
                )
            }
        }
    }
}
