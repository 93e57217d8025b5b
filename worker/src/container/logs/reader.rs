//! Reads one container's log.

use std::io::{self, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use skep_common::Timestamp;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncSeekExt, BufReader};

use super::super::dirs::{DataDir, RunDir};
use super::super::error::{Context, Error};
use super::format::{LogRecord, decode};
use super::watch::{Watch, Watcher};

/// Bytes that are read at once when looking for the last records, from the end.
const TAIL_BLOCK_BYTES: u64 = 64 * 1024;

/// Which records to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Byte at which to begin, as [`LogReader::position`] gave it; absent is the start.
    pub position: Option<u64>,
    /// Only that many of the last records, where no position is given.
    pub tail: Option<usize>,
    /// Only records of this moment and later ones.
    pub since: Option<Timestamp>,
    /// Whether to go on until the container ends.
    pub follow: bool,
}

/// Reads the records of one log in order.
#[derive(Debug)]
pub struct LogReader {
    id: String,
    file: BufReader<File>,
    /// What has been read of the record at hand.
    line: Vec<u8>,
    position: u64,
    since: Option<Timestamp>,
    follow: Option<Follow>,
}

#[derive(Debug)]
struct Follow {
    watcher: Arc<Watcher>,
    log: Watch,
    /// Absent where the run directory is gone, hence the container too.
    run: Option<Watch>,
    exit: PathBuf,
    lost: PathBuf,
}

impl LogReader {
    pub(in super::super) async fn open(
        id: &str,
        run: &RunDir,
        data: &DataDir,
        options: LogOptions,
        watcher: Arc<Watcher>,
    ) -> Result<Self, Error> {
        let path = data.log();
        let context = || format!("read {}", path.display());
        let file = match File::open(&path).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound(id.to_owned()));
            }
            other => other.during(context)?,
        };
        let follow = if options.follow {
            let log = watcher.watch(&path).during(context)?;
            let run_watch = watcher.watch(run.path()).ok();
            Some(Follow { watcher, log, run: run_watch, exit: run.exit(), lost: run.lost() })
        } else {
            None
        };
        let position = match (options.position, options.tail) {
            (Some(position), _) => position,
            (None, Some(n_records)) => {
                let file = file.try_clone().await.during(context)?.into_std().await;
                let tail = move || tail_position(&file, n_records);
                let position = tokio::task::spawn_blocking(tail).await.map_err(io::Error::other);
                position.flatten().during(context)?
            }
            (None, None) => 0,
        };
        let mut file = BufReader::new(file);
        file.seek(SeekFrom::Start(position)).await.during(context)?;
        let since = options.since;
        Ok(Self { id: id.to_owned(), file, line: Vec::new(), position, since, follow })
    }

    /// The byte behind the last record that was given.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next record; `None` at the end, which with `follow` is the container's end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            if let Some(record) = self.read_record().await? {
                return Ok(Some(record));
            }
            let Some(follow) = &self.follow else { return Ok(None) };
            let mut log = pin!(follow.log.notified());
            log.as_mut().enable();
            let mut run = pin!(follow.run.as_ref().map(Watch::notified));
            if let Some(run) = run.as_mut().as_pin_mut() {
                run.enable();
            }
            // In this order: what was written before the end was recorded is read after it.
            let has_ended = follow.has_ended();
            let id = &self.id;
            if let Some(record) =
                read_record(&mut self.file, &mut self.line, &mut self.position, self.since, id)
                    .await?
            {
                return Ok(Some(record));
            }
            if has_ended {
                return Ok(None);
            }
            tokio::select! {
                () = log => {}
                () = async { match run.as_pin_mut() {
                    Some(run) => run.await,
                    None => std::future::pending().await,
                }} => {}
                dispatched = follow.watcher.dispatch() => {
                    dispatched.during(|| "read file events".into())?;
                }
            }
        }
    }

    async fn read_record(&mut self) -> Result<Option<LogRecord>, Error> {
        read_record(&mut self.file, &mut self.line, &mut self.position, self.since, &self.id).await
    }
}

impl Follow {
    fn has_ended(&self) -> bool {
        self.run.is_none() || self.exit.exists() || self.lost.exists() || !self.has_run_dir()
    }

    fn has_run_dir(&self) -> bool {
        self.exit.parent().is_some_and(std::path::Path::exists)
    }
}

/// Reads up to the next wanted record that is whole. Cancel-safe: what was read stays in `line`.
async fn read_record(
    file: &mut BufReader<File>,
    line: &mut Vec<u8>,
    position: &mut u64,
    since: Option<Timestamp>,
    id: &str,
) -> Result<Option<LogRecord>, Error> {
    loop {
        let read = file.read_until(b'\n', line).await;
        read.during(|| format!("read the log of container {id}"))?;
        if !line.ends_with(b"\n") {
            return Ok(None);
        }
        *position += line.len() as u64;
        let record = decode(line);
        line.clear();
        match record {
            Some(record) if since.is_none_or(|since| since <= record.time) => {
                return Ok(Some(record));
            }
            Some(_) => {}
            // A machine that lost power may leave a torn record.
            None => tracing::debug!(container.id = id, position, "skipped a torn log record"),
        }
    }
}

/// The byte at which the last `n_records` whole records begin.
fn tail_position(file: &std::fs::File, n_records: usize) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = vec![0; usize::try_from(TAIL_BLOCK_BYTES).map_err(io::Error::other)?];
    let mut n_newlines = 0;
    while end > 0 {
        let start = end.saturating_sub(TAIL_BLOCK_BYTES);
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        file.read_exact_at(&mut block[..length], start)?;
        for (at, byte) in block[..length].iter().enumerate().rev() {
            if *byte == b'\n' {
                // The newline of the record before the first one that is wanted.
                if n_newlines == n_records {
                    return Ok(start + at as u64 + 1);
                }
                n_newlines += 1;
            }
        }
        end = start;
    }
    Ok(0)
}
