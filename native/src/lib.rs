use pyo3::prelude::*;
#[pymodule]
fn memvid_export_native(_m: &Bound<'_, PyModule>) -> PyResult<()> { Ok(()) }
