//! Reads a capsule back: documents with their text, and the vectors.
//!
//! memvid's own writers cut long documents into chunk frames; those are passed over here, so that the n-th document is
//! the n-th frame that was handed to a writer, whichever wrote it.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use memvid_core::find_last_valid_footer;
use memvid_core::types::{CanonicalEncoding, Frame, FrameRole, FrameStatus, Toc};

use crate::error::{At, Error, Result};

/// Largest text of one frame that is decompressed (memvid's own bound is 256 MiB).
const MAX_FRAME_BYTES: u64 = 256 * 1024 * 1024;

pub struct CapsuleReader {
    path: PathBuf,
    map: Mmap,
    toc: Toc,
    /// Places in `toc.frames` of the active documents.
    documents: Vec<usize>,
}

pub struct Vectors<'a> {
    /// The document of each row.
    pub documents: Vec<usize>,
    pub dimension: u32,
    /// Rows of `{frame id: u64, length: u64, values: f32…}`, little-endian.
    pub rows: &'a [u8],
}

impl CapsuleReader {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).at(path)?;
        // SAFETY: capsules are immutable: they appear by rename and are never written again. A file that is cut while
        // it is mapped would end the process with SIGBUS, as with any mapped file.
        let map = unsafe { Mmap::map(&file) }.at(path)?;
        let unreadable = |reason: String| Error::Unreadable {
            path: path.to_path_buf(),
            reason,
        };
        let footer =
            find_last_valid_footer(&map).ok_or_else(|| unreadable("no valid footer".into()))?;
        let toc = Toc::decode(footer.toc_bytes).map_err(|err| unreadable(err.to_string()))?;
        let documents = (0..toc.frames.len())
            .filter(|&at| {
                let frame = &toc.frames[at];
                frame.status == FrameStatus::Active && frame.role == FrameRole::Document
            })
            .collect();
        Ok(Self {
            path: path.to_path_buf(),
            map,
            toc,
            documents,
        })
    }

    pub fn document_count(&self) -> usize {
        self.documents.len()
    }

    pub fn model(&self) -> Option<&str> {
        self.toc.indexes.vec.as_ref()?.model.as_deref()
    }

    pub fn document(&self, id: usize) -> Result<&Frame> {
        let place = self
            .documents
            .get(id)
            .ok_or_else(|| self.unreadable(format!("no document {id}")))?;
        Ok(&self.toc.frames[*place])
    }

    pub fn text(&self, id: usize) -> Result<String> {
        let frame = self.document(id)?;
        let payload = self.range(frame.payload_offset, frame.payload_length)?;
        if blake3::hash(payload).as_bytes() != &frame.checksum {
            return Err(self.unreadable(format!(
                "payload of document {id} does not match its checksum"
            )));
        }
        let bytes = match frame.canonical_encoding {
            CanonicalEncoding::Plain => payload.to_vec(),
            CanonicalEncoding::Zstd => {
                let length = frame.canonical_length.unwrap_or(0);
                if length > MAX_FRAME_BYTES {
                    return Err(self.unreadable(format!("document {id} is {length} bytes long")));
                }
                zstd::bulk::decompress(payload, usize::try_from(length).unwrap_or(0))
                    .map_err(|err| self.unreadable(format!("document {id}: {err}")))?
            }
        };
        String::from_utf8(bytes).map_err(|_| self.unreadable(format!("document {id} is not UTF-8")))
    }

    pub fn vectors(&self) -> Result<Option<Vectors<'_>>> {
        let Some(manifest) = &self.toc.indexes.vec else {
            return Ok(None);
        };
        let bytes = self.range(manifest.bytes_offset, manifest.bytes_length)?;
        if blake3::hash(bytes).as_bytes() != &manifest.checksum {
            return Err(self.unreadable("the vectors do not match their checksum".into()));
        }
        let row = 16 + u64::from(manifest.dimension) * 4;
        let expected = manifest
            .vector_count
            .checked_mul(row)
            .and_then(|rows| rows.checked_add(8));
        if expected != Some(bytes.len() as u64) {
            return Err(self.unreadable("the vectors are not an exact, uncompressed index".into()));
        }
        let rows = &bytes[8..];
        let places: HashMap<u64, usize> = self
            .documents
            .iter()
            .enumerate()
            .map(|(id, place)| (self.toc.frames[*place].id, id))
            .collect();
        let documents = rows
            .chunks_exact(row as usize)
            .map(|row| {
                let id = u64::from_le_bytes(row[..8].try_into().unwrap_or_default());
                let parent = || self.toc.frames.get(usize::try_from(id).ok()?)?.parent_id;
                places.get(&id).or_else(|| places.get(&parent()?)).copied()
            })
            .collect::<Option<Vec<usize>>>()
            .ok_or_else(|| self.unreadable("a vector belongs to no document".into()))?;
        Ok(Some(Vectors {
            documents,
            dimension: manifest.dimension,
            rows,
        }))
    }

    fn range(&self, offset: u64, length: u64) -> Result<&[u8]> {
        let range = usize::try_from(offset).ok().and_then(|from| {
            usize::try_from(length)
                .ok()
                .and_then(|len| Some(from..from.checked_add(len)?))
        });
        range
            .and_then(|range| self.map.get(range))
            .ok_or_else(|| self.unreadable(format!("bytes {offset}+{length} lie outside the file")))
    }

    fn unreadable(&self, reason: String) -> Error {
        Error::Unreadable {
            path: self.path.clone(),
            reason,
        }
    }
}
