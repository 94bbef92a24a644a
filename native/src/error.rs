//! What can go wrong while a capsule is written or read.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("payload region would reach {needed} bytes, the capacity is {limit} bytes")]
    Capacity { needed: u64, limit: u64 },
    #[error("{what} would take {needed} bytes, memvid reads at most {limit} bytes back")]
    IndexTooLarge {
        what: &'static str,
        needed: u64,
        limit: u64,
    },
    #[error("frame {frame}: {reason}")]
    Frame { frame: u64, reason: String },
    #[error("vectors: {0}")]
    Vectors(String),
    #[error("lexical index: {0}")]
    Lexical(String),
    #[error("memvid-core: {0}")]
    Memvid(String),
    #[error("{path} is not a readable capsule: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("the writer was already finished, aborted or has failed")]
    Closed,
}

pub type Result<T> = std::result::Result<T, Error>;

impl From<memvid_core::MemvidError> for Error {
    fn from(err: memvid_core::MemvidError) -> Self {
        Error::Memvid(err.to_string())
    }
}

impl From<tantivy::TantivyError> for Error {
    fn from(err: tantivy::TantivyError) -> Self {
        Error::Lexical(err.to_string())
    }
}

/// Adds the path to an I/O error.
pub trait At<T> {
    fn at(self, path: &std::path::Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &std::path::Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            path: path.to_path_buf(),
            source,
        })
    }
}
