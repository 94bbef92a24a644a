//! Reads a capsule back: documents with their text, and the vectors.
//!
//! memvid's own writers cut long documents into chunk frames, with other white space, and keep the document without its
//! text; chunks are no documents here, so that the n-th document is the n-th frame that was handed to a writer,
//! whichever wrote it, and its text is that of its chunks.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use memvid_core::find_last_valid_footer;
use memvid_core::types::{CanonicalEncoding, Frame, FrameRole, FrameStatus, SegmentMeta, Toc};
use serde::de::DeserializeOwned;

use crate::error::{At, Error, Result};

/// Largest text of one frame that is decompressed (memvid's own bound is 256 MiB).
const MAX_FRAME_BYTES: u64 = 256 * 1024 * 1024;
/// Longest entry of the table of contents; without a bound a damaged length is allocated before its bytes are looked
/// for, and an allocation that fails ends the process.
const MAX_ENTRY_BYTES: usize = 256 * 1024 * 1024;

pub struct CapsuleReader {
    path: PathBuf,
    file: File,
    map: Mmap,
    /// The table of contents without its frames: those of 170,000 frames take 260 MB, so each is read where it lies
    /// when it is asked for.
    toc: Toc,
    /// Where each frame's entry begins in the file.
    frames: Vec<usize>,
    /// The active documents: places in `frames`, and frame ids.
    documents: Vec<(usize, u64)>,
    /// From the ids of documents that were cut to the places of their chunks, in order.
    chunks: HashMap<u64, Vec<(Option<u32>, usize)>>,
}

pub struct Vectors<'a> {
    /// The document of each row.
    pub documents: Vec<usize>,
    pub dimension: u32,
    /// Rows of `{frame id: u64, length: u64, values: f32…}`, little-endian.
    pub rows: Cow<'a, [u8]>,
}

/// Where vectors lie: memvid's own writers append a segment at each commit and leave the index empty.
struct VectorPart<'a> {
    offset: u64,
    length: u64,
    checksum: &'a [u8; 32],
    count: u64,
    dimension: u32,
}

impl CapsuleReader {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).at(path)?;
        // SAFETY: capsules are immutable: they appear by rename and are never written again. Reading what was cut off
        // a mapped file ends the process with SIGBUS, so each read looks at the length first (`whole`).
        let map = unsafe { Mmap::map(&file) }.at(path)?;
        let unreadable = |reason: String| Error::Unreadable {
            path: path.to_path_buf(),
            reason,
        };
        let footer =
            find_last_valid_footer(&map).ok_or_else(|| unreadable("no valid footer".into()))?;
        let mut entries = Entries {
            bytes: footer.toc_bytes,
            at: 0,
        };
        let (mut frames, mut documents) = (Vec::new(), Vec::new());
        let mut chunks: HashMap<u64, Vec<(Option<u32>, usize)>> = HashMap::new();
        let toc = entries
            .toc(|at, frame| {
                match (frame.status, frame.role, frame.parent_id) {
                    (FrameStatus::Active, FrameRole::Document, _) => {
                        documents.push((frames.len(), frame.id));
                    }
                    (FrameStatus::Active, FrameRole::DocumentChunk, Some(parent)) => {
                        let chunk = (frame.chunk_index, frames.len());
                        chunks.entry(parent).or_default().push(chunk);
                    }
                    _ => {}
                }
                frames.push(footer.toc_offset + at);
            })
            .map_err(unreadable)?;
        for places in chunks.values_mut() {
            places.sort_unstable();
        }
        Ok(Self {
            path: path.to_path_buf(),
            file,
            map,
            toc,
            frames,
            documents,
            chunks,
        })
    }

    pub fn document_count(&self) -> usize {
        self.documents.len()
    }

    pub fn model(&self) -> Option<&str> {
        self.toc.indexes.vec.as_ref()?.model.as_deref()
    }

    pub fn document(&self, id: usize) -> Result<Frame> {
        let (place, _) = self
            .documents
            .get(id)
            .ok_or_else(|| self.unreadable(format!("no document {id}")))?;
        self.frame(*place)
    }

    fn frame(&self, place: usize) -> Result<Frame> {
        let at = *self
            .frames
            .get(place)
            .ok_or_else(|| self.unreadable(format!("no frame {place}")))?;
        self.whole()?;
        let mut entries = Entries {
            bytes: &self.map,
            at,
        };
        entries.next().map_err(|err| self.unreadable(err))
    }

    /// Texts of documents `from` to `to`, with one decompression context for all: a new one for each costs more than the
    /// decompression of a frame.
    pub fn texts(&self, from: usize, to: usize) -> Result<Vec<String>> {
        let mut decompressor =
            zstd::bulk::Decompressor::new().map_err(|err| self.unreadable(err.to_string()))?;
        (from..to)
            .map(|id| self.text_with(id, &mut decompressor))
            .collect()
    }

    pub fn text(&self, id: usize) -> Result<String> {
        Ok(self.texts(id, id + 1)?.remove(0))
    }

    fn text_with(
        &self,
        id: usize,
        decompressor: &mut zstd::bulk::Decompressor<'_>,
    ) -> Result<String> {
        let frame = self.document(id)?;
        let text = self.payload(id, &frame, decompressor)?;
        match self.chunks.get(&frame.id) {
            Some(chunks) if text.is_empty() => {
                let texts = chunks
                    .iter()
                    .map(|(_, place)| self.payload(id, &self.frame(*place)?, decompressor));
                Ok(texts.collect::<Result<Vec<String>>>()?.join("\n"))
            }
            _ => Ok(text),
        }
    }

    fn payload(
        &self,
        id: usize,
        frame: &Frame,
        decompressor: &mut zstd::bulk::Decompressor<'_>,
    ) -> Result<String> {
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
                decompressor
                    .decompress(payload, usize::try_from(length).unwrap_or(0))
                    .map_err(|err| self.unreadable(format!("document {id}: {err}")))?
            }
        };
        String::from_utf8(bytes).map_err(|_| self.unreadable(format!("document {id} is not UTF-8")))
    }

    pub fn vectors(&self) -> Result<Option<Vectors<'_>>> {
        let parts = self.vector_parts();
        let Some(dimension) = parts.first().map(|part| part.dimension) else {
            return Ok(None);
        };
        let row = 16 + u64::from(dimension) * 4;
        let mut rows = Cow::Borrowed(&[][..]);
        for part in parts {
            let bytes = self.range(part.offset, part.length)?;
            if blake3::hash(bytes).as_bytes() != part.checksum {
                return Err(self.unreadable("the vectors do not match their checksum".into()));
            }
            let expected = part
                .count
                .checked_mul(row)
                .and_then(|rows| rows.checked_add(8));
            if part.dimension != dimension || expected != Some(bytes.len() as u64) {
                return Err(
                    self.unreadable("the vectors are not an exact, uncompressed index".into())
                );
            }
            if rows.is_empty() {
                rows = Cow::Borrowed(&bytes[8..]);
            } else {
                rows.to_mut().extend_from_slice(&bytes[8..]);
            }
        }
        let places: HashMap<u64, usize> = self
            .documents
            .iter()
            .enumerate()
            .map(|(document, (_, id))| (*id, document))
            .collect();
        let documents = rows
            .chunks_exact(row as usize)
            .map(|row| {
                let id = u64::from_le_bytes(row[..8].try_into().unwrap_or_default());
                let parent = || self.frame(usize::try_from(id).ok()?).ok()?.parent_id;
                places.get(&id).or_else(|| places.get(&parent()?)).copied()
            })
            .collect::<Option<Vec<usize>>>()
            .ok_or_else(|| self.unreadable("a vector belongs to no document".into()))?;
        Ok(Some(Vectors {
            documents,
            dimension,
            rows,
        }))
    }

    fn vector_parts(&self) -> Vec<VectorPart<'_>> {
        match &self.toc.indexes.vec {
            Some(index) if index.bytes_length > 0 => vec![VectorPart {
                offset: index.bytes_offset,
                length: index.bytes_length,
                checksum: &index.checksum,
                count: index.vector_count,
                dimension: index.dimension,
            }],
            _ => {
                let segments = self.toc.segment_catalog.vec_segments.iter();
                segments
                    .map(|segment| VectorPart {
                        offset: segment.common.bytes_offset,
                        length: segment.common.bytes_length,
                        checksum: &segment.common.checksum,
                        count: segment.vector_count,
                        dimension: segment.dimension,
                    })
                    .collect()
            }
        }
    }

    /// Compares everything that the table of contents names with its checksum: payloads, time index, lexical segments
    /// and vectors. memvid itself checks none of them when it reads.
    pub fn verify(&self) -> Result<()> {
        let check = |what: &str, offset: u64, length: u64, checksum: &[u8; 32]| {
            if blake3::hash(self.range(offset, length)?).as_bytes() == checksum {
                Ok(())
            } else {
                Err(self.unreadable(format!("{what} does not match its checksum")))
            }
        };
        for place in 0..self.frames.len() {
            let frame = self.frame(place)?;
            let what = format!("payload of frame {}", frame.id);
            check(
                &what,
                frame.payload_offset,
                frame.payload_length,
                &frame.checksum,
            )?;
        }
        if let Some(index) = &self.toc.time_index {
            check(
                "the time index",
                index.bytes_offset,
                index.bytes_length,
                &index.checksum,
            )?;
        }
        for segment in &self.toc.segment_catalog.tantivy_segments {
            let common = &segment.common;
            let what = format!("lexical file {}", segment.path);
            check(
                &what,
                common.bytes_offset,
                common.bytes_length,
                &common.checksum,
            )?;
        }
        for part in self.vector_parts() {
            check("the vector index", part.offset, part.length, part.checksum)?;
        }
        Ok(())
    }

    /// An error where the file was cut since it was opened.
    fn whole(&self) -> Result<()> {
        let length = self.file.metadata().at(&self.path)?.len();
        if length < self.map.len() as u64 {
            return Err(self.unreadable("the file was cut while it was open".into()));
        }
        Ok(())
    }

    fn range(&self, offset: u64, length: u64) -> Result<&[u8]> {
        self.whole()?;
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

/// Reads a table of contents piece by piece.
struct Entries<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Entries<'_> {
    fn next<T: DeserializeOwned>(&mut self) -> std::result::Result<T, String> {
        let config = bincode::config::standard()
            .with_fixed_int_encoding()
            .with_little_endian()
            .with_limit::<MAX_ENTRY_BYTES>();
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (value, length) =
            bincode::serde::decode_from_slice(rest, config).map_err(|err| err.to_string())?;
        self.at += length;
        Ok(value)
    }

    /// The table without its frames, of which each is shown with its place.
    fn toc(&mut self, mut show: impl FnMut(usize, Frame)) -> std::result::Result<Toc, String> {
        let _version: u64 = self.next()?;
        let _segments: Vec<SegmentMeta> = self.next()?;
        let mut others = self.bytes[..self.at].to_vec();
        let count: u64 = self.next()?;
        for _ in 0..count {
            let at = self.at;
            show(at, self.next()?);
        }
        others.extend(0u64.to_le_bytes());
        others.extend(&self.bytes[self.at..]);
        // Not Toc::decode, which has no bound.
        let mut rest = Entries {
            bytes: &others,
            at: 0,
        };
        let toc = rest.next()?;
        match others.len() - rest.at {
            0 => Ok(toc),
            more => Err(format!("{more} bytes follow the table of contents")),
        }
    }
}
