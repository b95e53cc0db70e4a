//! Which stacks can a program have?
//!
//! Written down frame by frame, from the innermost on, by function; where a library's functions have no names, by
//! image and number. A sample is taken anywhere, so a stack may begin at any part of a chain, but from there on every frame has
//! to be the next one: a frame too many, too few or another one, and the stack is none of the program's.

use std::path::Path;

use windlass_tests::stacks::Frame;

/// As many frames as there are, in [`Part::Any`].
pub(crate) const MANY: usize = usize::MAX;

/// A part of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// A frame of this function.
    Is(&'static str),
    /// The frames of these functions, in this order, over and over.
    Times(&'static [&'static str], usize),
    /// At least and at most so many frames of these functions, in any order.
    Some(&'static [&'static str], usize, usize),
    /// At least and at most so many frames of images whose base names begin so.
    In(&'static [&'static str], usize, usize),
    /// At least and at most so many frames, each one of these.
    Any(&'static [Of], usize, usize),
}

/// Whose a frame may be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Of {
    Function(&'static str),
    /// A function whose path begins so.
    Under(&'static str),
    /// An image whose base name begins so.
    Image(&'static str),
}

/// A stack that a program can have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    /// Whether the program spends its time in it: then it has to be seen whole.
    pub(crate) often: bool,
    /// Innermost first.
    pub(crate) parts: &'static [Part],
    /// What is around them.
    pub(crate) end: &'static [Part],
}

/// How a stack compares with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fit {
    /// Not this one.
    None,
    /// All of it from one of its parts on.
    Part,
    /// All of it.
    Whole,
}

/// One frame of a chain.
#[derive(Clone, Copy)]
enum Which {
    OneOf(&'static [&'static str]),
    Is(&'static str),
    In(&'static [&'static str]),
    Any(&'static [Of]),
}

/// A frame of a chain, that may be missing, and that may be there again.
#[derive(Clone, Copy)]
struct Slot {
    which: Which,
    is_optional: bool,
    again: bool,
}

impl Which {
    fn is(self, frame: &Frame) -> bool {
        let is_in = |image: &str| base_name(&frame.image).starts_with(image);
        let named = |name: &str| windlass_workload::names(&frame.function, name);
        match self {
            Self::Is(name) => named(name),
            Self::OneOf(names) => names.iter().any(|name| named(name)),
            Self::In(images) => images.iter().any(|image| is_in(image)),
            Self::Any(kinds) => kinds.iter().any(|kind| match kind {
                Of::Function(name) => named(name),
                Of::Under(path) => is_under(&frame.function, path),
                Of::Image(image) => is_in(image),
            }),
        }
    }
}

/// Whether a function is of the module at `path`, or of one for each type (`<T as core::any::Any>::type_id`).
fn is_under(function: &str, path: &str) -> bool {
    let name = function.trim_start_matches('<');
    let of_each = name.split_once(" as ").filter(|(of, _)| of.len() == 1);
    name.starts_with(path) || of_each.is_some_and(|(_, of)| of.starts_with(path))
}

/// The name of a file without its folder.
pub(crate) fn base_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

/// A chain frame by frame.
fn slots(chain: &Chain) -> Vec<Slot> {
    let mut slots = Vec::new();
    for part in chain.parts.iter().chain(chain.end) {
        let (which, least, most) = match *part {
            Part::Is(name) => (Which::Is(name), 1, 1),
            Part::Some(names, least, most) => (Which::OneOf(names), least, most),
            Part::In(images, least, most) => (Which::In(images), least, most),
            Part::Any(kinds, least, most) => (Which::Any(kinds), least, most),
            Part::Times(names, times) => {
                let names = names.iter().cycle().take(names.len() * times);
                slots.extend(names.map(|name| Slot {
                    which: Which::Is(name),
                    is_optional: false,
                    again: false,
                }));
                continue;
            }
        };
        let again = most == MANY;
        let count = if again { least + 1 } else { most };
        let slot = |index| Slot { which, is_optional: index >= least, again: again && index == least };
        slots.extend((0..count).map(slot));
    }
    slots
}

impl Chain {
    /// Whether a stack is this one. Of one that was `cut` short, outer frames may be missing.
    pub(crate) fn fit(&self, frames: &[Frame], cut: bool) -> Fit {
        let slots = slots(self);
        let behind = |mut at: Vec<bool>| {
            skip_optional(&slots, &mut at);
            for frame in frames {
                let mut next = vec![false; slots.len() + 1];
                for (index, slot) in slots.iter().enumerate() {
                    if at[index] && slot.which.is(frame) {
                        next[index + 1] = true;
                        next[index] |= slot.again;
                    }
                }
                skip_optional(&slots, &mut next);
                at = next;
            }
            at
        };
        let mut innermost = vec![false; slots.len() + 1];
        innermost[0] = true;
        let anywhere = behind(vec![true; slots.len() + 1]);
        if behind(innermost)[slots.len()] {
            Fit::Whole
        } else if anywhere[slots.len()] || cut && anywhere.contains(&true) {
            Fit::Part
        } else {
            Fit::None
        }
    }
}

/// Who is at a frame that may be missing is at the one behind it too.
fn skip_optional(slots: &[Slot], at: &mut [bool]) {
    for (index, slot) in slots.iter().enumerate() {
        at[index + 1] |= at[index] && slot.is_optional;
    }
}

#[cfg(test)]
mod tests {
    use super::{Chain, Fit, Part};
    use windlass_tests::stacks::Frame;

    const CHAIN: Chain = Chain {
        often: true,
        parts: &[Part::In(&["libx"], 0, 2), Part::Is("leaf"), Part::Times(&["odd", "even"], 2)],
        end: &[Part::Is("main"), Part::In(&["libc.so"], 2, 2), Part::Is("_start")],
    };

    #[track_caller]
    fn check(frames: &str, cut: bool, expect: Fit) {
        let frame = |word: &str| match word.strip_prefix("in:") {
            Some(image) => Frame { image: format!("/lib/{image}"), ..Frame::default() },
            None => Frame { function: word.to_owned(), ..Frame::default() },
        };
        let frames: Vec<Frame> = frames.split_whitespace().map(frame).collect();
        assert_eq!(CHAIN.fit(&frames, cut), expect, "{frames:?}");
    }

    #[test]
    fn stacks_fit_or_not() {
        let end = "main in:libc.so.6 in:libc.so.6 _start";
        check(&format!("leaf odd even odd even {end}"), false, Fit::Whole);
        check(&format!("in:libx.so in:libx.so leaf odd even odd even {end}"), false, Fit::Whole);
        check(&format!("even odd even {end}"), false, Fit::Part);
        check("_start", false, Fit::Part);
        check(&format!("leaf even odd even {end}"), false, Fit::None);
        check(&format!("leaf odd even odd {end}"), false, Fit::None);
        check(&format!("in:libx.so odd even odd even {end}"), false, Fit::None);
        check("leaf odd even odd even main in:libc.so.6 _start", false, Fit::None);
        check("leaf odd even", false, Fit::None);
        check("leaf odd even", true, Fit::Part);
        check("leaf even", true, Fit::None);
        check("", true, Fit::Part);
        check(&format!("leaf odd even odd even {end}"), true, Fit::Whole);
    }
}
