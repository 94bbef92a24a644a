//! Lays out Memvid capsules (`.mv2`) directly: frames, time index, Tantivy segments, vectors, TOC and seal.
//!
//! Memvid's own writer compiles its triplet patterns for every frame, keeps the WAL inside the capacity and builds its
//! lexical index twice; writing the finished layout with memvid-core's public types is about a thousand times faster
//! and gives byte-equal files for equal input. See `docs/capsule.md`.

pub mod error;
pub mod layout;
pub mod lexical;
#[cfg(feature = "python")]
mod python;
pub mod reader;
pub mod reference;

pub use error::{Error, Result};
pub use layout::{CapsuleWriter, FrameDoc, Options, Summary};
pub use reader::CapsuleReader;
