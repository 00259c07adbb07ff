//! What applies: for every option of a resource or volume the typed value and where it comes from.
//!
//! The one place that turns inherited lists into values. Spec: config-and-drbdadm.md §4.5, §5.

use bstr::ByteSlice;

use crate::model::{Opt, OptionList, Resource, Span, Volume};
use crate::options::{OPTIONS, OptionSpec, Section, Value, ValueError};

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The table's default.
    Default,
    /// Written here.
    Written(Span),
}

/// An option that applies.
#[derive(Clone, Debug)]
pub struct Effective {
    /// Its row.
    pub spec: &'static OptionSpec,
    /// Its value; an error where the text is none (the backend refuses it when it is used).
    pub value: Result<Value, ValueError>,
    /// Where it comes from.
    pub origin: Origin,
}

/// All options of a section with what applies, in the table's order.
///
/// `list` is the list after [`crate::expand::expand`].
pub fn section(section: Section, list: &OptionList) -> Vec<Effective> {
    let rows = OPTIONS.iter().filter(move |o| o.section == section);
    rows.map(|spec| effective(spec, list)).collect()
}

/// One option: the last one of its name applies, as the backend does it; of handlers, which no
/// backend sees, the first.
pub fn effective(spec: &'static OptionSpec, list: &OptionList) -> Effective {
    let mut all = list.items.iter().filter(|o| std::ptr::eq(o.spec, spec));
    let found = if spec.section == Section::Handlers { all.next() } else { all.next_back() };
    match found {
        None => Effective { spec, value: Ok(spec.default_value()), origin: Origin::Default },
        Some(Opt { value, span, .. }) => Effective {
            spec,
            value: spec.parse_value(value.as_ref().map(|v| v.as_bstr())),
            origin: Origin::Written(*span),
        },
    }
}

/// Options of one volume of the local host: disk options.
pub fn volume(volume: &Volume) -> Vec<Effective> {
    section(Section::Disk, &volume.disk_options)
}

/// Options of a resource by section, without the disk options, which belong to volumes.
pub fn resource(resource: &Resource) -> [(Section, Vec<Effective>); 4] {
    [
        (Section::Options, section(Section::Options, &resource.options)),
        (Section::Net, section(Section::Net, &resource.net)),
        (Section::Startup, section(Section::Startup, &resource.startup)),
        (Section::Handlers, section(Section::Handlers, &resource.handlers)),
    ]
}
