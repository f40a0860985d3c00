//! As much of Markdown as the documentation is made of: fenced blocks, headings, links,
//! code spans; and as much of the shell as its commands are made of.

use std::collections::HashMap;

/// A fenced block.
pub struct Block {
    /// What stands behind the opening fence, as in `toml upstream`.
    pub info: String,
    /// The number of its first line.
    pub line: usize,
    pub text: String,
}

/// A page, taken apart.
#[derive(Default)]
pub struct Page {
    pub blocks: Vec<Block>,
    /// The ids that its headings can be linked to by.
    pub anchors: Vec<String>,
    /// Targets of links and images, with the number of the line.
    pub links: Vec<(usize, String)>,
    /// Contents of code spans, with the number of the line.
    pub spans: Vec<(usize, String)>,
}

impl Page {
    pub fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut open: Option<(&str, Block)> = None;
        let mut prose = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let bare = line.trim_start();
            match open.take() {
                Some((indent, mut block)) => {
                    if bare.starts_with("```") {
                        page.blocks.push(block);
                        continue;
                    }
                    block.text += line.strip_prefix(indent).unwrap_or(line);
                    block.text.push('\n');
                    open = Some((indent, block));
                }
                None => match bare.strip_prefix("```") {
                    Some(info) => {
                        let block = Block {
                            info: info.to_owned(),
                            line: number + 1,
                            text: String::new(),
                        };
                        open = Some((&line[..line.len() - bare.len()], block));
                    }
                    None => prose.push((number, line)),
                },
            }
        }
        assert!(open.is_none(), "a fenced block has no end");
        page.read_prose(&prose);
        page
    }

    fn read_prose(&mut self, lines: &[(usize, &str)]) {
        let mut known = HashMap::<String, usize>::new();
        for (_, line) in lines {
            let Some((marks, heading)) = line.split_once(' ') else {
                continue;
            };
            if marks.is_empty() || !marks.bytes().all(|mark| mark == b'#') {
                continue;
            }
            let slug = slug(heading);
            let times = known.entry(slug.clone()).or_default();
            self.anchors.push(match *times {
                0 => slug,
                more => format!("{slug}-{more}"),
            });
            *times += 1;
        }
        // A link may be broken over two lines, so all prose is read as one text.
        let mut text = String::new();
        let mut starts = Vec::new();
        for (number, line) in lines {
            starts.push((text.len(), *number));
            text += line;
            text.push('\n');
        }
        let line_of = |at: usize| {
            let after = starts.partition_point(|(start, _)| *start <= at);
            starts[after - 1].1
        };
        let mut rest = text.as_str();
        while let Some(at) = rest.find(['`', ']']) {
            let position = text.len() - rest.len() + at;
            let (found, after) = (&rest[at..=at], &rest[at + 1..]);
            rest = after;
            let end = match found {
                "`" => after.find('`'),
                _ if after.starts_with('(') => after.find(')'),
                _ => None,
            };
            let Some(end) = end else {
                continue;
            };
            match found {
                "`" => self
                    .spans
                    .push((line_of(position), after[..end].to_owned())),
                _ => self
                    .links
                    .push((line_of(position), after[1..end].to_owned())),
            }
            rest = &after[end + 1..];
        }
    }
}

/// The id of a heading, as GitHub and mdBook make it.
pub fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

/// The commands of a shell block, as words. Redirections are left out.
pub fn commands(block: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut is_target = false;
    let mut chars = block.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                if chars.next_if_eq(&'\n').is_none() {
                    word.get_or_insert_default().extend(chars.next());
                }
            }
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                word.extend(chars.by_ref().take_while(|other| *other != c));
            }
            '#' if word.is_none() => while chars.next_if(|other| *other != '\n').is_some() {},
            ' ' | '\n' | ';' | '&' | '|' | '>' | '<' => {
                let done = word.take();
                if !is_target && let Some(last) = commands.last_mut() {
                    last.extend(done);
                } else if done.is_some() {
                    is_target = false;
                }
                match c {
                    '>' | '<' => is_target = true,
                    ' ' => {}
                    _ => commands.push(Vec::new()),
                }
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    commands.retain(|command| !command.is_empty());
    commands
}

#[test]
fn blocks_links_and_spans_are_found() {
    let page = Page::parse(
        "# A `b` c?\n\n[x\ny](z.md#a) and `code`, `[no](link)`\n\n  ```toml listener\n  a = 1\n  ```\n# A b c\n",
    );
    assert_eq!(page.anchors, ["a-b-c", "a-b-c-1"]);
    assert_eq!(page.links, [(4, "z.md#a".to_owned())]);
    let spans: Vec<_> = page.spans.iter().map(|(_, span)| span.as_str()).collect();
    assert_eq!(spans, ["b", "code", "[no](link)"]);
    assert_eq!(page.blocks[0].info, "toml listener");
    assert_eq!(page.blocks[0].text, "a = 1\n");
}

#[test]
fn commands_are_split_as_by_a_shell() {
    let block = "sudo a --b '[::]:5' >out # no\nc \\\n  d && e | f > g;h \"i j\"\nnft 'k\nl'\n";
    let expected: [&[&str]; 6] = [
        &["sudo", "a", "--b", "[::]:5"],
        &["c", "d"],
        &["e"],
        &["f"],
        &["h", "i j"],
        &["nft", "k\nl"],
    ];
    assert_eq!(commands(block), expected);
}
