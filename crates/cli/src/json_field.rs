//! Extracts the fields of a JSON line that make its key.
//!
//! serde_json checks that the line is JSON. The values are then cut out of the text unchanged, in one pass and without parsing
//! the others. A number parsed as an `f64` would lose digits, so two keys that differ only in those digits would be equal, and
//! the second line would be lost.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// The path of a field, as in jq: `.a.b`, `.list[0]`, `.["a b"]`; also `.list.0` and `."a b"`.
#[derive(Debug, Clone)]
pub(crate) struct FieldPath {
    text: String,
    steps: Vec<Step>,
}

#[derive(Debug, Clone)]
struct Step {
    /// The name of a field. `None` for an index in brackets.
    name: Option<String>,
    /// The index in an array. `None` for a quoted name.
    index: Option<usize>,
}

impl FromStr for FieldPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut steps = Vec::new();
        let mut rest = text;
        while !rest.is_empty() || steps.is_empty() {
            let (step, after) = Step::cut(rest, steps.is_empty()).map_err(|why| match rest {
                "" => format!("at the end: {why}"),
                _ => format!("at {rest}, byte {}: {why}", text.len() - rest.len()),
            })?;
            steps.push(step);
            rest = after;
        }
        Ok(Self { text: text.to_owned(), steps })
    }
}

impl Step {
    /// Splits off the first step of a path.
    fn cut(path: &str, is_first: bool) -> Result<(Self, &str), String> {
        let after_dot = path.strip_prefix('.');
        // A dot before a bracket is optional, except at the beginning.
        let in_brackets = after_dot.or((!is_first).then_some(path)).and_then(|path| path.strip_prefix('['));
        if let Some(inside) = in_brackets {
            return Self::cut_brackets(skip_space(inside));
        }
        let path = after_dot.ok_or("a field begins with a dot, as in .user.id")?;
        if path.starts_with('"') {
            return Self::cut_quoted(path);
        }
        let (name, after) = path.split_at_checked(path.find(['.', '[']).unwrap_or(path.len())).unwrap_or((path, ""));
        if name.is_empty() {
            return Err("the name of the field is missing".to_owned());
        }
        // These characters are operators in jq, so they are more likely a mistake than a part of the name.
        if name.contains(['"', ']', '|', '?', ',', '(', ')']) {
            return Err(format!("a path selects one field; quote a name such as {name}, as in .[\"a|b\"]"));
        }
        Ok((Self { name: Some(name.to_owned()), index: name.parse().ok() }, after))
    }

    fn cut_quoted(path: &str) -> Result<(Self, &str), String> {
        let (quoted, after) = path.split_at_checked(value_len(path.as_bytes())).unwrap_or((path, ""));
        let name = serde_json::from_str(quoted)
            .map_err(|_| format!("{quoted} is not a quoted name, as in .\"a.b\" or .[\"a b\"]"))?;
        Ok((Self { name: Some(name), index: None }, after))
    }

    /// `inside` is the text after the opening bracket.
    fn cut_brackets(inside: &str) -> Result<(Self, &str), String> {
        let (step, after) = if inside.starts_with('"') {
            Self::cut_quoted(inside)?
        } else {
            let digits = inside.find(|char: char| !char.is_ascii_digit()).unwrap_or(inside.len());
            let (place, after) = inside.split_at_checked(digits).unwrap_or((inside, ""));
            let index = place.parse().map_err(|_| {
                "brackets contain an array index, as in [0], or a quoted name, as in [\"a b\"]".to_owned()
            })?;
            (Self { name: None, index: Some(index) }, after)
        };
        let after = skip_space(after).strip_prefix(']').ok_or("the bracket is not closed after one index or name")?;
        Ok((step, after))
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The JSON text of the value at each path, or `None` if the line has no such field.
pub(crate) fn find<'l>(line: &'l [u8], paths: &[FieldPath]) -> Result<Vec<Option<&'l str>>, NotJson> {
    let line = str::from_utf8(line).map_err(|_| NotJson::NotText)?;
    let serde::de::IgnoredAny = serde_json::from_str(line).map_err(NotJson::Syntax)?;
    let mut found = vec![None; paths.len()];
    let wanted: Vec<Wanted<'_>> =
        paths.iter().enumerate().map(|(place, path)| Wanted { place, steps: &path.steps }).collect();
    descend(line, &wanted, &mut found);
    Ok(found)
}

/// The rest of a path, and the index of its value in the result.
struct Wanted<'p> {
    place: usize,
    steps: &'p [Step],
}

fn descend<'l>(value: &'l str, wanted: &[Wanted<'_>], found: &mut [Option<&'l str>]) {
    for (name, member) in Members::of(value) {
        for &Wanted { place, steps } in wanted {
            let Some((step, steps)) = steps.split_first() else { continue };
            if !name.is(step) {
                continue;
            }
            // If a name occurs twice, the last one counts, even if the rest of the path does not exist in it.
            if let Some(slot) = found.get_mut(place) {
                *slot = steps.is_empty().then_some(member);
            }
            if !steps.is_empty() {
                descend(member, &[Wanted { place, steps }], found);
            }
        }
    }
}

/// The members of an object or array, as JSON text. Any other value has none.
struct Members<'l> {
    rest: &'l str,
    /// The index of the next one, in an array.
    index: Option<usize>,
}

enum Name<'l> {
    /// With its quotes.
    Field(&'l str),
    Index(usize),
}

impl Name<'_> {
    fn is(&self, step: &Step) -> bool {
        match self {
            Self::Field(quoted) => step.name.is_some() && string(quoted).as_deref() == step.name.as_deref(),
            Self::Index(index) => step.index == Some(*index),
        }
    }
}

impl<'l> Members<'l> {
    fn of(value: &'l str) -> Self {
        let value = skip_space(value);
        match value.strip_prefix('[') {
            Some(rest) => Self { rest, index: Some(0) },
            None => Self { rest: value.strip_prefix('{').unwrap_or_default(), index: None },
        }
    }

    /// Splits off the next value and the separator after it.
    fn cut(&mut self) -> Option<&'l str> {
        let rest = skip_space(self.rest);
        let (value, rest) = rest.split_at_checked(value_len(rest.as_bytes()))?;
        let rest = skip_space(rest);
        self.rest = rest.strip_prefix([',', ':']).unwrap_or(rest);
        // The value is empty at a closing bracket.
        (!value.is_empty()).then_some(value)
    }
}

impl<'l> Iterator for Members<'l> {
    type Item = (Name<'l>, &'l str);

    fn next(&mut self) -> Option<Self::Item> {
        let name = match &mut self.index {
            None => Name::Field(self.cut()?),
            Some(next) => {
                let index = *next;
                *next += 1;
                Name::Index(index)
            }
        };
        Some((name, self.cut()?))
    }
}

fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

/// The length of the JSON value that the text begins with.
fn value_len(text: &[u8]) -> usize {
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.iter().enumerate() {
        let ended = if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => quoted = false,
                _ => {}
            }
            !quoted
        } else {
            match byte {
                b'"' => quoted = true,
                b'{' | b'[' => depth += 1,
                // A number or literal ends before the next separator.
                b',' | b':' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r' if depth == 0 => return at,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            matches!(byte, b'}' | b']')
        };
        if ended && depth == 0 {
            return at + 1;
        }
    }
    text.len()
}

/// The characters of a JSON string. `None` if an escape in it is not a character.
fn string(quoted: &str) -> Option<Cow<'_, str>> {
    match quoted.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(text) if !text.contains('\\') => Some(Cow::Borrowed(text)),
        _ => serde_json::from_str(quoted).ok().map(Cow::Owned),
    }
}

/// The part of a key that a value makes, or a name for a value that makes none.
pub(crate) fn key_part(value: &str) -> Result<Cow<'_, str>, &'static str> {
    match value.as_bytes().first() {
        Some(b'"') => string(value).ok_or("text with a broken escape"),
        Some(b'{') => Err("an object"),
        Some(b'[') => Err("an array"),
        Some(b'n') => Err("null"),
        _ => Ok(Cow::Borrowed(value)),
    }
}

/// Why a line is not JSON.
#[derive(Debug)]
pub(crate) enum NotJson {
    NotText,
    Syntax(serde_json::Error),
}

impl fmt::Display for NotJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText => f.write_str("it is not UTF-8"),
            Self::Syntax(error) => {
                // The "at line 1" of serde_json would look like a line number of the file.
                let message = error.to_string();
                let what = message.split(" at line ").next().unwrap_or_default();
                write!(f, "{what} at byte {}", error.column())
            }
        }
    }
}

/// Checks any bytes, which are a path, "\n" and a line: the path selects the same value as in serde_json, and a bad path or a
/// line that is not JSON is an error.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_check(bytes: &[u8]) {
    use serde_json::Value;

    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return };
    let (path, line) = (String::from_utf8_lossy(&bytes[..end]), &bytes[end + 1..]);
    let Ok(path) = path.parse::<FieldPath>().inspect(|parsed| assert_eq!(parsed.to_string(), path)) else { return };
    let value = serde_json::from_slice::<Value>(line);
    let Ok(found) = find(line, std::slice::from_ref(&path)) else {
        assert!(value.is_err(), "it is JSON");
        return;
    };
    let part = found[0].map(key_part);
    // serde_json accepts some JSON that it cannot make a `Value` of, such as half of a surrogate pair.
    let Ok(value) = value else { return };
    let expected = path.steps.iter().try_fold(&value, |value, step| match value {
        Value::Object(members) => members.get(step.name.as_ref()?),
        Value::Array(elements) => elements.get(step.index?),
        _ => None,
    });
    assert_eq!(found[0].map(|text| serde_json::from_str::<Value>(text).expect("it is JSON")).as_ref(), expected);
    match (part, expected) {
        (None, None) | (Some(Err(_)), Some(Value::Null | Value::Array(_) | Value::Object(_))) => {}
        (Some(Ok(part)), Some(Value::String(text))) => assert_eq!(part, *text),
        (Some(Ok(part)), Some(Value::Number(_) | Value::Bool(_))) => assert_eq!(Some(part.as_ref()), found[0]),
        (part, _) => panic!("{part:?} of {expected:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn fuzz_corpus_paths_select_the_same_value_as_serde_json() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/json_path");
        let tried = std::fs::read_dir(corpus).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            fuzz_check(&std::fs::read(path).unwrap());
        });
        assert!(tried.count() > 2);
    }

    fn json() -> impl Strategy<Value = Value> {
        let text = "[a-c\"\\\\{}\\[\\],: \n\u{e9}]{0,4}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(text, inner, 0..4).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    /// Every path in a value with its target, in either form.
    fn paths(value: &Value, path: &str, brackets: bool, found: &mut Vec<(String, Value)>) {
        let members: Vec<(String, &Value)> = match value {
            Value::Object(map) => {
                map.iter().map(|(name, value)| (Value::from(name.as_str()).to_string(), value)).collect()
            }
            Value::Array(list) => list.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
            _ => Vec::new(),
        };
        for (step, member) in members {
            let dot = if path.is_empty() { "." } else { "" };
            let path = if brackets { format!("{path}{dot}[{step}]") } else { format!("{path}.{step}") };
            found.push((path.clone(), member.clone()));
            paths(member, &path, brackets, found);
        }
    }

    proptest! {
        #[test]
        fn every_path_selects_the_same_value_as_serde_json(value in json(), pretty: bool, brackets: bool) {
            let line = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            let (mut names, mut values) = (Vec::new(), Vec::new());
            let mut all = Vec::new();
            paths(&value, "", brackets, &mut all);
            for (path, value) in all {
                names.push(path.parse::<FieldPath>().unwrap());
                values.push(value);
            }
            let found = find(line.as_bytes(), &names).unwrap();
            let found: Vec<Value> = found.iter().map(|text| serde_json::from_str(text.unwrap()).unwrap()).collect();
            prop_assert_eq!(found, values);
        }
    }

    fn at<'l>(path: &str, line: &'l str) -> Option<&'l str> {
        find(line.as_bytes(), &[path.parse().unwrap()]).unwrap()[0]
    }

    #[test]
    fn a_path_selects_the_text_of_a_value() {
        let line = r#" { "a" : {"b": "x,}\"", "c":[1,{"d":-1.50e3},[]], "a":2} , "x.y":true,"e":[ ],"":0 } "#;
        for (path, value) in [
            (".a.b", Some(r#""x,}\"""#)),
            (".a.a", Some("2")),
            (".a.c.0", Some("1")),
            (".a.c.1.d", Some("-1.50e3")),
            (".a.c.2", Some("[]")),
            (".a.c.3", None),
            (".a.c", Some(r#"[1,{"d":-1.50e3},[]]"#)),
            (".\"x.y\"", Some("true")),
            (".x.y", None),
            (".e.0", None),
            (".\"\"", Some("0")),
            (".b", None),
            (".a.b.c", None),
            (".a.c[1].d", Some("-1.50e3")),
            (".a.c.[1][\"d\"]", Some("-1.50e3")),
            (".[\"a\"].c[ 0 ]", Some("1")),
            (".[\"x.y\"]", Some("true")),
            (".[\"\"]", Some("0")),
            (".a[0]", None),
            (".a.c[\"0\"]", None),
            (".a.c.\"0\"", None),
            (".a.c[3]", None),
            (".[0]", None),
        ] {
            assert_eq!(at(path, line), value, "{path}");
        }
        for line in ["1", "\"a\"", "null", "[]", "{}"] {
            assert_eq!(at(".a", line), None, "{line}");
        }
    }

    #[test]
    fn several_paths_return_values_in_the_order_of_the_paths() {
        let paths: Vec<FieldPath> = [".b", ".a.y", ".a", ".a.x"].map(|path| path.parse().unwrap()).to_vec();
        let found = find(br#"{"a":{"x":1,"y":2},"b":3}"#, &paths).unwrap();
        assert_eq!(found, [Some("3"), Some("2"), Some(r#"{"x":1,"y":2}"#), Some("1")]);
    }

    #[test]
    fn the_last_of_two_equal_names_counts() {
        assert_eq!(at(".a", r#"{"a":1,"\u0061":2}"#), Some("2"));
        assert_eq!(at(".a.b", r#"{"a":{"b":1},"a":{}}"#), None);
        assert_eq!(at(".a.b", r#"{"a":{"b":1},"a":5}"#), None);
    }

    #[test]
    fn a_string_makes_its_characters_a_key_and_a_number_its_text() {
        let value = |line| key_part(at(".a", line).unwrap());
        assert_eq!(value(r#"{"a":"A\u00e9\n"}"#).unwrap(), "Aé\n");
        assert_eq!(value(r#"{"a":18446744073709551617}"#).unwrap(), "18446744073709551617");
        assert_eq!(value(r#"{"a":1.10}"#).unwrap(), "1.10");
        assert_eq!(value(r#"{"a":false}"#).unwrap(), "false");
        for (line, what) in [
            (r#"{"a":null}"#, "null"),
            (r#"{"a":{}}"#, "an object"),
            (r#"{"a":[1]}"#, "an array"),
            (r#"{"a":"\ud800"}"#, "text with a broken escape"),
        ] {
            assert_eq!(value(line).unwrap_err(), what);
        }
    }

    #[test]
    fn a_line_that_is_not_json_is_an_error_with_the_reason() {
        let why = |line: &[u8]| find(line, &[]).unwrap_err().to_string();
        assert_eq!(why(b"\"\xff\""), "it is not UTF-8");
        assert_eq!(why(b"{\"a\":1"), "EOF while parsing an object at byte 6");
        assert!(!why(b"{} {}").contains("line"));
    }

    #[test]
    fn a_quoted_name_is_not_an_index() {
        assert_eq!(at(".[1]", "[5,6]"), Some("6"));
        assert_eq!(at(".1", "[5,6]"), Some("6"));
        assert_eq!(at(".[\"1\"]", "[5,6]"), None);
        assert_eq!(at(".[1]", r#"{"1":7}"#), None);
        assert_eq!(at(".1", r#"{"1":7}"#), Some("7"));
        assert_eq!(at(".[\"1\"]", r#"{"1":7}"#), Some("7"));
        assert_eq!(at(".a-b.@c.d e", r#"{"a-b":{"@c":{"d e":7}}}"#), Some("7"));
    }

    #[test]
    fn a_bad_path_is_an_error_that_names_the_position() {
        for (path, place, why) in [
            ("", "at the end: ", "begins with a dot"),
            (".", "at ., byte 0: ", "name of the field is missing"),
            ("a", "at a, byte 0: ", "begins with a dot"),
            (".a.", "at ., byte 2: ", "name of the field is missing"),
            (".a..b", "at ..b, byte 2: ", "name of the field is missing"),
            ("..", "at .., byte 0: ", "name of the field is missing"),
            (".\"a", "at .\"a, byte 0: ", "\"a is not a quoted name"),
            (".\"a\"b", "at b, byte 4: ", "begins with a dot"),
            (".a\"b\"", "at .a\"b\", byte 0: ", "quote a name"),
            (".a b.\"\\x\"", "at .\"\\x\", byte 4: ", "not a quoted name"),
            ("[0]", "at [0], byte 0: ", "begins with a dot"),
            (".a[]", "at [], byte 2: ", "an array index"),
            (".a[-1].b", "at [-1].b, byte 2: ", "an array index"),
            (".a[x]", "at [x], byte 2: ", "a quoted name"),
            (".a['x']", "at ['x'], byte 2: ", "a quoted name"),
            (".a[99999999999999999999999]", "at [9", "an array index"),
            (".a[1:2]", "at [1:2], byte 2: ", "not closed"),
            (".a[0", "at [0, byte 2: ", "not closed"),
            (".a[\"b\"", "at [\"b\", byte 2: ", "not closed"),
            (".[\"a b]", "at .[\"a b], byte 0: ", "not a quoted name"),
            (".[\"\\ud800\"]", "at .[", "not a quoted name"),
            (".a]", "at .a], byte 0: ", "quote a name"),
            (".a | .b", "at .a | .b, byte 0: ", "selects one field"),
            (".a?", "at .a?, byte 0: ", "selects one field"),
            (".a,.b", "at .a,.b, byte 0: ", "selects one field"),
        ] {
            let error = path.parse::<FieldPath>().unwrap_err();
            assert!(error.starts_with(place) && error.contains(why), "{path}: {error}");
        }
    }
}
