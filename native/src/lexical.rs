//! One Tantivy segment per slice of frames, in the schema that memvid-core opens.
//!
//! The schema has memvid's fields in memvid's order. Of the stored values memvid reads back only `frame_id`, so nothing
//! else is stored: results, scores and snippets are the same and the file is a third smaller.

use std::collections::HashMap;

use tantivy::directory::{Directory, RamDirectory};
use tantivy::indexer::SingleSegmentIndexWriter;
use tantivy::schema::{
    Field, IndexRecordOption, NumericOptions, Schema, TextFieldIndexing, TextOptions,
};
use tantivy::tokenizer::{
    Language, LowerCaser, RawTokenizer, SimpleTokenizer, Stemmer, TextAnalyzer, Token, TokenStream,
    Tokenizer,
};
use tantivy::{Index, IndexSettings, TantivyDocument};

use crate::error::{Error, Result};
use crate::layout::FrameDoc;

/// Name under which memvid-core registers its analyzer (SimpleTokenizer, LowerCaser, English Stemmer).
const ANALYZER: &str = "memvid_default";
/// Words whose stems one worker remembers; bounds the cache at a few MB.
const STEM_CACHE_WORDS: usize = 100_000;
/// Longer words are not remembered.
const STEM_CACHE_WORD_BYTES: usize = 64;
/// Only sizes Tantivy's first hash table; a slice never spills.
const SEGMENT_MEMORY_BUDGET: usize = 64 * 1024 * 1024;

/// A file of a finished segment, under its stable name.
pub struct SegmentFile {
    pub name: String,
    pub bytes: Vec<u8>,
    pub checksum: [u8; 32],
}

/// A finished segment and its entry in `meta.json`.
pub struct Segment {
    pub meta: serde_json::Value,
    pub files: Vec<SegmentFile>,
}

#[derive(Clone, Copy)]
struct Fields {
    content: Field,
    tags: Field,
    _labels: Field,
    track: Field,
    uri: Field,
    timestamp: Field,
    frame_id: Field,
}

fn schema() -> (Schema, Fields) {
    let text = |tokenizer: &str, record| {
        TextOptions::default().set_indexing_options(
            TextFieldIndexing::default()
                .set_tokenizer(tokenizer)
                .set_index_option(record),
        )
    };
    let keyword = text(ANALYZER, IndexRecordOption::Basic);
    let mut builder = Schema::builder();
    let fields = Fields {
        content: builder.add_text_field(
            "content",
            text(ANALYZER, IndexRecordOption::WithFreqsAndPositions),
        ),
        tags: builder.add_text_field("tags", keyword.clone()),
        _labels: builder.add_text_field("labels", keyword.clone()),
        track: builder.add_text_field("track", keyword),
        uri: builder.add_text_field("uri", text("raw", IndexRecordOption::Basic)),
        timestamp: builder.add_i64_field(
            "timestamp",
            NumericOptions::default().set_indexed().set_fast(),
        ),
        frame_id: builder.add_u64_field(
            "frame_id",
            NumericOptions::default().set_indexed().set_stored(),
        ),
    };
    (builder.build(), fields)
}

/// memvid's analyzer with the stems of seen words remembered: a word is analysed by Tantivy's own chain the first time,
/// so the tokens are the same, at a third of the time on source code.
#[derive(Clone)]
struct CachedAnalyzer {
    chain: TextAnalyzer,
    stems: HashMap<Box<str>, Box<str>>,
    token: Token,
}

impl CachedAnalyzer {
    fn new() -> Self {
        let chain = TextAnalyzer::builder(SimpleTokenizer::default())
            .filter(LowerCaser)
            .filter(Stemmer::new(Language::English))
            .build();
        Self {
            chain,
            stems: HashMap::new(),
            token: Token::default(),
        }
    }
}

struct CachedStream<'a> {
    text: &'a str,
    at: usize,
    analyzer: &'a mut CachedAnalyzer,
}

impl Tokenizer for CachedAnalyzer {
    type TokenStream<'a> = CachedStream<'a>;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> CachedStream<'a> {
        self.token.reset();
        CachedStream {
            text,
            at: 0,
            analyzer: self,
        }
    }
}

impl CachedStream<'_> {
    /// The next run of alphanumeric characters, as SimpleTokenizer cuts it.
    fn next_word(&mut self) -> Option<(usize, usize)> {
        let bytes = self.text.as_bytes();
        let mut start = None;
        let mut at = self.at;
        while at < bytes.len() {
            let (alphanumeric, width) = if bytes[at] < 0x80 {
                (bytes[at].is_ascii_alphanumeric(), 1)
            } else {
                match self.text[at..].chars().next() {
                    Some(c) => (c.is_alphanumeric(), c.len_utf8()),
                    None => break,
                }
            };
            match (alphanumeric, start) {
                (true, None) => start = Some(at),
                (false, Some(from)) => {
                    self.at = at + width;
                    return Some((from, at));
                }
                _ => {}
            }
            at += width;
        }
        self.at = at;
        start.map(|from| (from, at))
    }
}

impl TokenStream for CachedStream<'_> {
    fn advance(&mut self) -> bool {
        let Some((from, to)) = self.next_word() else {
            return false;
        };
        let word = &self.text[from..to];
        let CachedAnalyzer {
            chain,
            stems,
            token,
        } = &mut *self.analyzer;
        token.position = token.position.wrapping_add(1);
        token.offset_from = from;
        token.offset_to = to;
        token.text.clear();
        if let Some(stem) = stems.get(word) {
            token.text.push_str(stem);
            return true;
        }
        let mut stream = chain.token_stream(word);
        if stream.advance() {
            token.text.push_str(&stream.token().text);
        }
        if stems.len() < STEM_CACHE_WORDS && word.len() <= STEM_CACHE_WORD_BYTES {
            stems.insert(word.into(), token.text.as_str().into());
        }
        true
    }

    fn token(&self) -> &Token {
        &self.analyzer.token
    }

    fn token_mut(&mut self) -> &mut Token {
        &mut self.analyzer.token
    }
}

/// Builds the segment of slice `slice`, whose frames have ids from `first_id` on.
pub fn build_segment(
    slice: u64,
    first_id: u64,
    frames: &[FrameDoc],
    timestamp: i64,
) -> Result<Segment> {
    let (schema, fields) = schema();
    let directory = RamDirectory::create();
    let index = Index::create(directory.clone(), schema, IndexSettings::default())?;
    index.tokenizers().register(ANALYZER, CachedAnalyzer::new());
    index.tokenizers().register("raw", RawTokenizer::default());
    let mut writer =
        SingleSegmentIndexWriter::<TantivyDocument>::new(index, SEGMENT_MEMORY_BUDGET)?;
    for (id, frame) in (first_id..).zip(frames) {
        // memvid indexes no frame whose text is blank.
        if frame.text.trim().is_empty() {
            continue;
        }
        let mut document = TantivyDocument::default();
        document.add_text(fields.content, &frame.text);
        document.add_i64(fields.timestamp, timestamp);
        document.add_u64(fields.frame_id, id);
        for tag in &frame.tags {
            document.add_text(fields.tags, tag.to_ascii_lowercase());
        }
        document.add_text(fields.track, frame.track.to_ascii_lowercase());
        document.add_text(fields.uri, frame.uri.to_ascii_lowercase());
        writer.add_document(document)?;
    }
    let index = writer.finalize()?;
    let meta = index.load_metas()?;
    let segment = meta
        .segments
        .first()
        .ok_or_else(|| Error::Lexical("a slice gave no segment".into()))?;
    let random_name = segment.id().uuid_string();
    let stable_name = stable_name(slice);
    let mut files = Vec::new();
    for path in segment.list_files() {
        if !directory
            .exists(&path)
            .map_err(|err| Error::Lexical(err.to_string()))?
        {
            continue;
        }
        let bytes = directory
            .open_read(&path)
            .map_err(|err| Error::Lexical(err.to_string()))?
            .read_bytes()
            .map_err(|err| Error::Lexical(err.to_string()))?
            .to_vec();
        let name = path.to_string_lossy().replace(&random_name, &stable_name);
        files.push(SegmentFile {
            name,
            checksum: *blake3::hash(&bytes).as_bytes(),
            bytes,
        });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let dashed = format!(
        "{}-{}-{}-{}-{}",
        &stable_name[..8],
        &stable_name[8..12],
        &stable_name[12..16],
        &stable_name[16..20],
        &stable_name[20..]
    );
    let meta =
        serde_json::json!({ "segment_id": dashed, "max_doc": segment.max_doc(), "deletes": null });
    Ok(Segment { meta, files })
}

/// A segment's name from its place, in place of Tantivy's random one, so that equal frames give equal bytes.
fn stable_name(slice: u64) -> String {
    let hash = blake3::hash(format!("memvid-export lexical slice {slice}").as_bytes());
    hash.to_hex()[..32].to_string()
}

/// `meta.json` and `.managed.json` over all segments.
pub fn index_files(
    metas: Vec<serde_json::Value>,
    file_names: &[String],
) -> Result<Vec<SegmentFile>> {
    let (schema, _) = schema();
    let encode = |value: &serde_json::Value| {
        let mut bytes = serde_json::to_vec(value).map_err(|err| Error::Lexical(err.to_string()))?;
        bytes.push(b'\n');
        Ok::<_, Error>(bytes)
    };
    let schema = serde_json::to_value(&schema).map_err(|err| Error::Lexical(err.to_string()))?;
    let settings = serde_json::to_value(IndexSettings::default())
        .map_err(|err| Error::Lexical(err.to_string()))?;
    let meta = serde_json::json!({
        "index_settings": settings,
        "segments": metas,
        "schema": schema,
        "opstamp": 0,
    });
    let mut managed: Vec<&str> = file_names.iter().map(String::as_str).collect();
    managed.push("meta.json");
    managed.sort_unstable();
    let file = |name: &str, bytes: Vec<u8>| SegmentFile {
        name: name.into(),
        checksum: *blake3::hash(&bytes).as_bytes(),
        bytes,
    };
    Ok(vec![
        file(".managed.json", encode(&serde_json::json!(managed))?),
        file("meta.json", encode(&meta)?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens<T: Tokenizer>(tokenizer: &mut T, text: &str) -> Vec<Token> {
        let mut stream = tokenizer.token_stream(text);
        let mut found = Vec::new();
        while stream.advance() {
            found.push(stream.token().clone());
        }
        found
    }

    #[test]
    fn remembered_stems_are_the_stems_of_the_chain() {
        let text = "Running runners RUN; getUserById(user_id) naïve ΣΊΣΥΦΟΣ 東京タワー x1y2 — running, Runners' İstanbul";
        let mut cached = CachedAnalyzer::new();
        let mut chain = TextAnalyzer::builder(SimpleTokenizer::default())
            .filter(LowerCaser)
            .filter(Stemmer::new(Language::English))
            .build();
        let mut expected = Vec::new();
        let mut stream = chain.token_stream(text);
        while stream.advance() {
            expected.push(stream.token().clone());
        }
        drop(stream);
        for _ in 0..2 {
            let found = tokens(&mut cached, text);
            assert_eq!(found.len(), expected.len());
            for (ours, theirs) in found.iter().zip(&expected) {
                assert_eq!(
                    (&ours.text, ours.position, ours.offset_from, ours.offset_to),
                    (
                        &theirs.text,
                        theirs.position,
                        theirs.offset_from,
                        theirs.offset_to
                    )
                );
            }
        }
    }
}
