//! The Python module `memvid_export_native`.

use std::path::PathBuf;
use std::sync::Mutex;

use pyo3::buffer::PyBuffer;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::error::Error;
use crate::layout::{self, FrameDoc, Options};

create_exception!(
    memvid_export_native,
    NativeError,
    PyException,
    "The capsule could not be written or read."
);
create_exception!(
    memvid_export_native,
    CapacityError,
    NativeError,
    "The capsule would pass a size limit of Memvid."
);

impl From<Error> for PyErr {
    fn from(err: Error) -> Self {
        let message = err.to_string();
        match err {
            Error::Io { source, .. } => {
                // Keeps errno, so that a full disk is told from a missing folder.
                match source.raw_os_error() {
                    Some(errno) => pyo3::exceptions::PyOSError::new_err((errno, message)),
                    None => pyo3::exceptions::PyOSError::new_err(message),
                }
            }
            Error::Capacity { .. } | Error::IndexTooLarge { .. } => CapacityError::new_err(message),
            _ => NativeError::new_err(message),
        }
    }
}

/// `(uri, title, track, kind, tags, text, metadata, embed_text, extra)`: `common.frames.model.Frame`.
fn frame_doc(frame: &Bound<'_, PyTuple>) -> PyResult<(FrameDoc, bool)> {
    let text = |at: usize| frame.get_item(at)?.extract::<String>();
    let doc = FrameDoc {
        uri: text(0)?,
        title: text(1)?,
        track: text(2)?,
        tags: frame.get_item(4)?.extract()?,
        text: text(5)?,
        extra: text(8)?,
    };
    Ok((doc, !frame.get_item(7)?.is_none()))
}

/// Frames and, for each that wants one, `(position, row number)`.
type Batch = (Vec<FrameDoc>, Vec<usize>);

fn batch(frames: &Bound<'_, PyAny>) -> PyResult<Batch> {
    let mut docs = Vec::with_capacity(frames.len()?);
    let mut embedded = Vec::new();
    for frame in frames.try_iter()? {
        let (doc, wants_vector) = frame_doc(frame?.downcast::<PyTuple>()?)?;
        if wants_vector {
            embedded.push(docs.len());
        }
        docs.push(doc);
    }
    Ok((docs, embedded))
}

/// The values of a C-contiguous float32 matrix with `expected` rows.
fn values(py: Python<'_>, vectors: Option<PyBuffer<f32>>, expected: usize) -> PyResult<Vec<f32>> {
    let Some(buffer) = vectors else {
        return Ok(Vec::new());
    };
    let shape = buffer.shape();
    if shape.len() != 2 || shape[0] != expected {
        return Err(PyValueError::new_err(format!(
            "vectors have shape {shape:?}; {expected} frames of this batch have an embed_text"
        )));
    }
    buffer.to_vec(py)
}

/// Writes one capsule file; see `common.capsule.port.PartWriter`.
#[pyclass(frozen)]
struct CapsuleWriter {
    inner: Mutex<Option<layout::CapsuleWriter>>,
}

impl CapsuleWriter {
    /// The lock is held by one call at a time; a call that panicked leaves a writer that is closed.
    fn lock(&self) -> PyResult<std::sync::MutexGuard<'_, Option<layout::CapsuleWriter>>> {
        Ok(self.inner.lock().map_err(|_| Error::Closed)?)
    }
}

#[pymethods]
impl CapsuleWriter {
    #[new]
    #[pyo3(signature = (path, *, timestamp, slice_frames, capacity, threads, model=None, dimension=None))]
    fn new(
        path: PathBuf,
        timestamp: i64,
        slice_frames: usize,
        capacity: u64,
        threads: usize,
        model: Option<String>,
        dimension: Option<usize>,
    ) -> PyResult<Self> {
        let options = Options {
            timestamp,
            model,
            dimension,
            slice_frames,
            capacity,
            threads,
        };
        Ok(Self {
            inner: Mutex::new(Some(layout::CapsuleWriter::create(&path, options)?)),
        })
    }

    /// Adds frames, and a row of `vectors` for each that has an `embed_text`.
    #[pyo3(signature = (frames, vectors=None))]
    fn add(
        &self,
        py: Python<'_>,
        frames: &Bound<'_, PyAny>,
        vectors: Option<PyBuffer<f32>>,
    ) -> PyResult<()> {
        let (docs, embedded) = batch(frames)?;
        let values = values(py, vectors, embedded.len())?;
        py.detach(|| {
            let mut guard = self.lock()?;
            let inner = guard.as_mut().ok_or(Error::Closed)?;
            Ok(inner.add(docs, &embedded, &values)?)
        })
    }

    /// Seals the file and answers `(frames, vectors, payload_end, file_bytes)`.
    fn finish(&self, py: Python<'_>) -> PyResult<(u64, u64, u64, u64)> {
        py.detach(|| {
            let mut inner = self.lock()?.take().ok_or(Error::Closed)?;
            let summary = inner.finish()?;
            Ok((
                summary.frames,
                summary.vectors,
                summary.payload_end,
                summary.file_bytes,
            ))
        })
    }

    /// Ends the worker threads; the unfinished file stays for the caller to remove.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.lock()?.take();
            Ok(())
        })
    }
}

/// Reads a capsule back.
#[pyclass(frozen)]
struct CapsuleReader {
    inner: crate::CapsuleReader,
}

type FrameTuple = (String, String, String, Vec<String>, String);
type VectorRows<'py> = (Vec<usize>, u32, Bound<'py, PyBytes>);

#[pymethods]
impl CapsuleReader {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self {
            inner: py.detach(|| crate::CapsuleReader::open(&path))?,
        })
    }

    #[getter]
    fn frame_count(&self) -> usize {
        self.inner.document_count()
    }

    #[getter]
    fn model(&self) -> Option<&str> {
        self.inner.model()
    }

    /// `(uri, title, track, tags, text)` of frames `start` to `start + count`.
    fn frames(&self, py: Python<'_>, start: usize, count: usize) -> PyResult<Vec<FrameTuple>> {
        let end = start.saturating_add(count).min(self.inner.document_count());
        let frames = py.detach(|| {
            let texts = self.inner.texts(start.min(end), end)?;
            (start..end)
                .zip(texts)
                .map(|(id, text)| {
                    let frame = self.inner.document(id)?;
                    Ok((
                        frame.uri.unwrap_or_default(),
                        frame.title.unwrap_or_default(),
                        frame.track.unwrap_or_default(),
                        frame.tags,
                        text,
                    ))
                })
                .collect::<crate::Result<Vec<FrameTuple>>>()
        })?;
        Ok(frames)
    }

    /// Compares all payloads and indexes with their checksums.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.inner.verify())?)
    }

    /// `(document of each row, dimension, rows)` or None; a row is `{u64 frame id, u64 length, f32…}`, little-endian.
    fn vectors<'py>(&self, py: Python<'py>) -> PyResult<Option<VectorRows<'py>>> {
        let Some(vectors) = self.inner.vectors()? else {
            return Ok(None);
        };
        let rows = PyBytes::new(py, &vectors.rows);
        Ok(Some((vectors.documents, vectors.dimension, rows)))
    }
}

/// Replaces the indexes of a capsule by those that memvid-core builds itself, to compare with.
#[pyfunction]
fn memvid_core_commit(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    py.detach(|| crate::reference::commit(&path))?;
    Ok(())
}

#[pymodule]
fn memvid_export_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("MEMVID_CORE_VERSION", memvid_core::MEMVID_CORE_VERSION)?;
    module.add("NativeError", module.py().get_type::<NativeError>())?;
    module.add("CapacityError", module.py().get_type::<CapacityError>())?;
    module.add_class::<CapsuleWriter>()?;
    module.add_class::<CapsuleReader>()?;
    module.add_function(wrap_pyfunction!(memvid_core_commit, module)?)?;
    Ok(())
}
