//! The capsule writer: frames in, a sealed `.mv2` file out.
//!
//! Frames are cut into slices of a fixed number of frames, never by the machine's core count, so that files are the
//! same everywhere. Each slice is compressed, encoded and indexed by one worker thread; at most two slices a worker are
//! held at once. Payloads go straight into the file; lexical segments and vectors wait in unlinked temporary files
//! beside it, because Memvid counts everything before the last payload against its capacity.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use memvid_core::io::header::HeaderCodec;
use memvid_core::types::{
    CanonicalEncoding, Frame, FrameRole, FrameStatus, LexSegmentManifest, SegmentCommon,
    TantivySegmentDescriptor, TimeIndexManifest, Toc, VecIndexManifest, VectorCompression,
};
use memvid_core::{
    find_last_valid_footer, time_index_append, CommitFooter, Memvid, TimeIndexEntry,
};
use serde_json::value::RawValue;

use crate::error::{At, Error, Result};
use crate::lexical::{self, Segment, SegmentFile};

/// zstd level of payloads: 3 is memvid's own; 6 takes 2% less for nearly twice the time.
const ZSTD_LEVEL: i32 = 3;
/// memvid reads no TOC and no index larger than this back (`MAX_INDEX_BYTES`).
const MAX_INDEX_BYTES: u64 = 512 * 1024 * 1024;
/// `CommitFooter` carries a generation; a fresh capsule is the first commit.
const FIRST_GENERATION: u64 = 1;

/// One document, as the caller hands it over.
pub struct FrameDoc {
    pub uri: String,
    pub title: String,
    pub track: String,
    pub tags: Vec<String>,
    pub text: String,
    /// A JSON object; each top-level value becomes a string of `extra_metadata`.
    pub extra: String,
}

pub struct Options {
    /// Unix seconds, given to every frame.
    pub timestamp: i64,
    /// Name of the embedding model, kept in the vector manifest.
    pub model: Option<String>,
    /// Dimension of the vectors; None for a capsule without.
    pub dimension: Option<usize>,
    /// Frames in a slice, which is one lexical segment.
    pub slice_frames: usize,
    /// Bytes that header, WAL and payloads may take.
    pub capacity: u64,
    /// Worker threads; the file does not depend on it.
    pub threads: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub frames: u64,
    pub vectors: u64,
    pub payload_end: u64,
    pub file_bytes: u64,
}

struct Slice {
    index: u64,
    first_id: u64,
    frames: Vec<FrameDoc>,
}

struct EncodedFrame {
    frame: Frame,
    payload: Vec<u8>,
}

struct DoneSlice {
    index: u64,
    frames: Vec<EncodedFrame>,
    segment: Segment,
}

/// A temporary file that is gone when the process is.
struct Spool {
    out: BufWriter<File>,
    len: u64,
}

impl Spool {
    fn beside(path: &Path) -> Result<Self> {
        let folder = path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let file = tempfile::tempfile_in(folder).at(folder)?;
        Ok(Self {
            out: BufWriter::with_capacity(1 << 20, file),
            len: 0,
        })
    }

    fn push(&mut self, bytes: &[u8], path: &Path) -> Result<()> {
        self.out.write_all(bytes).at(path)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn into_file(self, path: &Path) -> Result<File> {
        let mut file = self
            .out
            .into_inner()
            .map_err(|err| err.into_error())
            .at(path)?;
        file.rewind().at(path)?;
        Ok(file)
    }
}

/// Writes one capsule file.
pub struct CapsuleWriter {
    path: PathBuf,
    options: Options,
    out: BufWriter<File>,
    header: memvid_core::types::Header,
    toc: Toc,
    offset: u64,
    pending: Vec<FrameDoc>,
    added: u64,
    slices_sent: u64,
    slices_written: u64,
    waiting: BTreeMap<u64, DoneSlice>,
    toc_frames: Vec<u8>,
    lexical: Option<Spool>,
    segment_metas: Vec<serde_json::Value>,
    segment_files: Vec<(String, u64, u64, [u8; 32])>,
    vectors: Option<Spool>,
    vector_count: u64,
    jobs: Option<SyncSender<Slice>>,
    done: Option<Receiver<Result<DoneSlice>>>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
}

impl CapsuleWriter {
    pub fn create(path: &Path, options: Options) -> Result<Self> {
        if options.slice_frames == 0 || options.threads == 0 || options.dimension == Some(0) {
            return Err(Error::Frame {
                frame: 0,
                reason: "slice, threads and dimension must be positive".into(),
            });
        }
        // memvid-core writes an empty capsule: header, WAL, empty TOC. From there on the file is ours.
        drop(Memvid::create(path)?);
        let bytes = std::fs::read(path).at(path)?;
        let footer = find_last_valid_footer(&bytes)
            .ok_or_else(|| Error::Memvid("a fresh capsule has no footer".into()))?;
        let toc = Toc::decode(footer.toc_bytes)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .at(path)?;
        let header = HeaderCodec::read(&mut file)?;
        let offset = header.wal_offset + header.wal_size;
        file.set_len(offset).at(path)?;
        file.seek(SeekFrom::Start(offset)).at(path)?;

        let (jobs, job_receiver) = sync_channel::<Slice>(options.threads);
        let (done_sender, done) = sync_channel(options.threads * 2);
        let job_receiver = Arc::new(Mutex::new(job_receiver));
        let timestamp = options.timestamp;
        let workers = (0..options.threads)
            .map(|_| {
                let jobs = Arc::clone(&job_receiver);
                let done = done_sender.clone();
                std::thread::spawn(move || work(&jobs, &done, timestamp))
            })
            .collect();
        let vectors = options.dimension.map(|_| Spool::beside(path)).transpose()?;
        Ok(Self {
            path: path.to_path_buf(),
            out: BufWriter::with_capacity(1 << 20, file),
            header,
            toc,
            offset,
            pending: Vec::with_capacity(options.slice_frames),
            added: 0,
            slices_sent: 0,
            slices_written: 0,
            waiting: BTreeMap::new(),
            toc_frames: Vec::new(),
            lexical: Some(Spool::beside(path)?),
            segment_metas: Vec::new(),
            segment_files: Vec::new(),
            vectors,
            vector_count: 0,
            jobs: Some(jobs),
            done: Some(done),
            workers,
            in_flight: 0,
            options,
        })
    }

    /// Adds frames; `embedded` are the places of those that have a vector, `values` their rows one after the other.
    pub fn add(&mut self, frames: Vec<FrameDoc>, embedded: &[usize], values: &[f32]) -> Result<()> {
        if self.jobs.is_none() {
            return Err(Error::Closed);
        }
        self.add_vectors(frames.len(), embedded, values)?;
        for frame in frames {
            self.pending.push(frame);
            self.added += 1;
            if self.pending.len() == self.options.slice_frames {
                self.send_slice()?;
            }
        }
        Ok(())
    }

    fn add_vectors(&mut self, frames: usize, embedded: &[usize], values: &[f32]) -> Result<()> {
        let Some(dimension) = self.options.dimension else {
            if values.is_empty() {
                return Ok(());
            }
            return Err(Error::Vectors(
                "this capsule was opened without a dimension".into(),
            ));
        };
        if values.len() != embedded.len() * dimension || embedded.iter().any(|at| *at >= frames) {
            return Err(Error::Vectors(format!(
                "{} values came for {} vectors; the capsule takes {dimension} a vector",
                values.len(),
                embedded.len()
            )));
        }
        let spool = self.vectors.as_mut().ok_or(Error::Closed)?;
        // bincode of Vec<VecDocument {frame_id: u64, embedding: Vec<f32>}>, fixed-width little-endian; the leading
        // count is written when it is known.
        let mut rows = Vec::with_capacity(embedded.len() * (16 + dimension * 4));
        for (at, row) in embedded.iter().zip(values.chunks_exact(dimension)) {
            rows.extend_from_slice(&(self.added + *at as u64).to_le_bytes());
            rows.extend_from_slice(&(dimension as u64).to_le_bytes());
            rows.extend(row.iter().flat_map(|value| value.to_le_bytes()));
        }
        let needed = 8 + spool.len + rows.len() as u64;
        if needed > MAX_INDEX_BYTES {
            return Err(Error::IndexTooLarge {
                what: "the vector index",
                needed,
                limit: MAX_INDEX_BYTES,
            });
        }
        spool.push(&rows, &self.path)?;
        self.vector_count += embedded.len() as u64;
        Ok(())
    }

    fn send_slice(&mut self) -> Result<()> {
        let frames = std::mem::replace(
            &mut self.pending,
            Vec::with_capacity(self.options.slice_frames),
        );
        let slice = Slice {
            index: self.slices_sent,
            first_id: self.added - frames.len() as u64,
            frames,
        };
        while self.in_flight >= self.options.threads * 2 {
            self.take_done()?;
        }
        let jobs = self.jobs.as_ref().ok_or(Error::Closed)?;
        jobs.send(slice).map_err(|_| Error::Closed)?;
        self.slices_sent += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// Waits for one slice and writes those whose turn it is.
    fn take_done(&mut self) -> Result<()> {
        let slice = self
            .done
            .as_ref()
            .ok_or(Error::Closed)?
            .recv()
            .map_err(|_| Error::Lexical("a worker thread ended early".into()))??;
        self.in_flight -= 1;
        self.waiting.insert(slice.index, slice);
        while let Some(slice) = self.waiting.remove(&self.slices_written) {
            self.write_slice(slice)?;
            self.slices_written += 1;
        }
        Ok(())
    }

    fn write_slice(&mut self, slice: DoneSlice) -> Result<()> {
        for EncodedFrame { mut frame, payload } in slice.frames {
            let end = self.offset + payload.len() as u64;
            if end > self.options.capacity {
                return Err(Error::Capacity {
                    needed: end,
                    limit: self.options.capacity,
                });
            }
            frame.payload_offset = self.offset;
            self.out.write_all(&payload).at(&self.path)?;
            self.offset = end;
            encode_into(&mut self.toc_frames, &frame)?;
        }
        if self.toc_frames.len() as u64 > MAX_INDEX_BYTES {
            return Err(Error::IndexTooLarge {
                what: "the table of contents",
                needed: self.toc_frames.len() as u64,
                limit: MAX_INDEX_BYTES,
            });
        }
        self.segment_metas.push(slice.segment.meta);
        for file in slice.segment.files {
            self.spool_lexical(file)?;
        }
        Ok(())
    }

    fn spool_lexical(&mut self, file: SegmentFile) -> Result<()> {
        let spool = self.lexical.as_mut().ok_or(Error::Closed)?;
        let at = spool.len;
        spool.push(&file.bytes, &self.path)?;
        self.segment_files
            .push((file.name, at, file.bytes.len() as u64, file.checksum));
        Ok(())
    }

    /// Writes the indexes, the TOC and the seal, and syncs the file.
    pub fn finish(&mut self) -> Result<Summary> {
        if self.jobs.is_none() {
            return Err(Error::Closed);
        }
        if !self.pending.is_empty() {
            self.send_slice()?;
        }
        self.jobs = None;
        while self.in_flight > 0 {
            self.take_done()?;
        }
        for worker in self.workers.drain(..) {
            worker
                .join()
                .map_err(|_| Error::Lexical("a worker thread panicked".into()))?;
        }
        let payload_end = self.offset;
        self.write_time_index()?;
        self.write_lexical()?;
        self.write_vectors()?;
        let file_bytes = self.seal()?;
        Ok(Summary {
            frames: self.added,
            vectors: self.vector_count,
            payload_end,
            file_bytes,
        })
    }

    fn write_time_index(&mut self) -> Result<()> {
        let timestamp = self.options.timestamp;
        let mut entries: Vec<TimeIndexEntry> = (0..self.added)
            .map(|id| TimeIndexEntry::new(timestamp, id))
            .collect();
        let (bytes_offset, bytes_length, checksum) =
            time_index_append(&mut self.out, &mut entries)?;
        self.offset = bytes_offset + bytes_length;
        self.toc.time_index = Some(TimeIndexManifest {
            bytes_offset,
            bytes_length,
            entry_count: self.added,
            checksum,
        });
        Ok(())
    }

    fn write_lexical(&mut self) -> Result<()> {
        let names: Vec<String> = self
            .segment_files
            .iter()
            .map(|file| file.0.clone())
            .collect();
        for file in lexical::index_files(std::mem::take(&mut self.segment_metas), &names)? {
            self.spool_lexical(file)?;
        }
        let base = self.offset;
        let spool = self.lexical.take().ok_or(Error::Closed)?;
        let mut spooled = spool.into_file(&self.path)?;
        self.offset += std::io::copy(&mut spooled, &mut self.out).at(&self.path)?;
        let mut files = std::mem::take(&mut self.segment_files);
        files.sort_by(|a, b| a.0.cmp(&b.0));
        let catalog = &mut self.toc.segment_catalog;
        for (segment_id, (path, at, bytes_length, checksum)) in
            (catalog.next_segment_id..).zip(files)
        {
            let bytes_offset = base + at;
            catalog
                .tantivy_segments
                .push(TantivySegmentDescriptor::from_common(
                    SegmentCommon::new(segment_id, bytes_offset, bytes_length, checksum),
                    path.clone(),
                ));
            catalog.next_segment_id = segment_id + 1;
            self.toc.indexes.lex_segments.push(LexSegmentManifest {
                path,
                bytes_offset,
                bytes_length,
                checksum,
            });
        }
        catalog.version = 1;
        catalog.lex_enabled = true;
        Ok(())
    }

    fn write_vectors(&mut self) -> Result<()> {
        let Some(dimension) = self.options.dimension else {
            return Ok(());
        };
        if self.vector_count == 0 {
            return Ok(());
        }
        let bytes_offset = self.offset;
        let count = self.vector_count.to_le_bytes();
        self.out.write_all(&count).at(&self.path)?;
        self.offset += 8;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&count);
        let spool = self.vectors.take().ok_or(Error::Closed)?;
        let mut file = spool.into_file(&self.path)?;
        let copied = copy_hashed(&mut file, &mut self.out, &mut hasher).at(&self.path)?;
        self.offset += copied;
        self.toc.indexes.vec = Some(VecIndexManifest {
            vector_count: self.vector_count,
            dimension: u32::try_from(dimension)
                .map_err(|_| Error::Vectors("dimension over 2^32".into()))?,
            bytes_offset,
            bytes_length: self.offset - bytes_offset,
            checksum: *hasher.finalize().as_bytes(),
            compression_mode: VectorCompression::None,
            model: self.options.model.clone(),
        });
        Ok(())
    }

    fn seal(&mut self) -> Result<u64> {
        // Toc is {toc_version: u64, segments: Vec, frames: Vec, …, toc_checksum: [u8; 32]}; its frames are encoded
        // already, so they are put between the encoding of what stands before and behind them. Holding 170,000 Frame
        // structs until here instead costs 300 MB.
        self.toc.toc_checksum = [0; 32];
        self.toc.frames = Vec::new();
        let empty = self.toc.encode()?;
        let frames_at = 16 + 8;
        if !self.toc.segments.is_empty() || empty[16..24] != [0; 8] {
            return Err(Error::Memvid(
                "the TOC's frames are not where this layout expects them".into(),
            ));
        }
        let mut toc = Vec::with_capacity(empty.len() + self.toc_frames.len());
        toc.extend_from_slice(&empty[..16]);
        toc.extend_from_slice(&self.added.to_le_bytes());
        toc.extend_from_slice(&self.toc_frames);
        toc.extend_from_slice(&empty[frames_at..]);
        self.toc_frames = Vec::new();
        let checksum = Toc::calculate_checksum(&toc);
        let checksum_at = toc.len() - 32;
        toc[checksum_at..].copy_from_slice(&checksum);

        let footer = CommitFooter {
            toc_len: toc.len() as u64,
            toc_hash: *blake3::hash(&toc).as_bytes(),
            generation: FIRST_GENERATION,
        };
        let footer_offset = self.offset;
        self.out.write_all(&toc).at(&self.path)?;
        self.out.write_all(&footer.encode()).at(&self.path)?;
        self.out.flush().at(&self.path)?;
        let end = self.out.stream_position().at(&self.path)?;
        let file = self.out.get_mut();
        file.set_len(end).at(&self.path)?;
        self.header.footer_offset = footer_offset;
        self.header.toc_checksum = checksum;
        HeaderCodec::write(&mut *file, &self.header)?;
        file.sync_all().at(&self.path)?;
        Ok(end)
    }
}

impl Drop for CapsuleWriter {
    /// Ends the worker threads of a writer that did not finish.
    fn drop(&mut self) {
        self.jobs = None;
        self.done = None;
        for worker in self.workers.drain(..) {
            // A worker that panicked has already been reported by take_done, or nobody waits for its slice any more.
            let _ = worker.join();
        }
    }
}

fn copy_hashed(
    from: &mut File,
    to: &mut impl Write,
    hasher: &mut blake3::Hasher,
) -> std::io::Result<u64> {
    use std::io::Read;
    let mut buffer = vec![0; 1 << 20];
    let mut copied = 0;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(copied);
        }
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
        copied += read as u64;
    }
}

fn encode_into(out: &mut Vec<u8>, frame: &Frame) -> Result<()> {
    let config = bincode::config::standard()
        .with_fixed_int_encoding()
        .with_little_endian();
    bincode::serde::encode_into_std_write(frame, out, config)
        .map_err(|err| Error::Memvid(err.to_string()))?;
    Ok(())
}

fn work(jobs: &Mutex<Receiver<Slice>>, done: &SyncSender<Result<DoneSlice>>, timestamp: i64) {
    loop {
        let job = match jobs.lock() {
            Ok(receiver) => receiver.recv(),
            Err(_) => return,
        };
        let Ok(slice) = job else { return };
        let result = encode_slice(slice, timestamp);
        let failed = result.is_err();
        if done.send(result).is_err() || failed {
            return;
        }
    }
}

fn encode_slice(slice: Slice, timestamp: i64) -> Result<DoneSlice> {
    let segment = lexical::build_segment(slice.index, slice.first_id, &slice.frames, timestamp)?;
    let mut compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|err| Error::Frame {
        frame: slice.first_id,
        reason: err.to_string(),
    })?;
    let mut frames = Vec::with_capacity(slice.frames.len());
    for (id, doc) in (slice.first_id..).zip(slice.frames) {
        frames.push(encode_frame(id, doc, timestamp, &mut compressor)?);
    }
    Ok(DoneSlice {
        index: slice.index,
        frames,
        segment,
    })
}

fn encode_frame(
    id: u64,
    doc: FrameDoc,
    timestamp: i64,
    compressor: &mut zstd::bulk::Compressor<'_>,
) -> Result<EncodedFrame> {
    let reason = |err: String| Error::Frame {
        frame: id,
        reason: err,
    };
    let payload = compressor
        .compress(doc.text.as_bytes())
        .map_err(|err| reason(err.to_string()))?;
    let frame = Frame {
        id,
        timestamp,
        anchor_ts: None,
        anchor_source: None,
        // The uri and the track say it already; 16 bytes a frame.
        kind: None,
        track: Some(doc.track),
        payload_offset: 0,
        payload_length: payload.len() as u64,
        checksum: *blake3::hash(&payload).as_bytes(),
        uri: Some(doc.uri),
        title: Some(doc.title),
        canonical_encoding: CanonicalEncoding::Zstd,
        canonical_length: Some(doc.text.len() as u64),
        metadata: None,
        // memvid falls back to the payload: the same results and scores, 18% less file.
        search_text: None,
        tags: doc.tags,
        labels: Vec::new(),
        extra_metadata: extra_metadata(&doc.extra)
            .map_err(|err| reason(format!("metadata: {err}")))?,
        content_dates: Vec::new(),
        chunk_manifest: None,
        role: FrameRole::Document,
        parent_id: None,
        chunk_index: None,
        chunk_count: None,
        status: FrameStatus::Active,
        supersedes: None,
        superseded_by: None,
        source_sha256: None,
        source_path: None,
        enrichment_state: Default::default(),
    };
    Ok(EncodedFrame { frame, payload })
}

/// The top-level values of a JSON object as strings: strings as they are, all else as the JSON that stands there.
pub fn extra_metadata(json: &str) -> serde_json::Result<BTreeMap<String, String>> {
    let values: BTreeMap<String, &RawValue> = serde_json::from_str(json)?;
    values
        .into_iter()
        .map(|(key, value)| {
            let raw = value.get();
            let text = if raw.starts_with('"') {
                serde_json::from_str(raw)?
            } else {
                raw.to_string()
            };
            Ok((key, text))
        })
        .collect()
}
