//! A reader of Prometheus' text format that accepts nothing else.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

/// Labels of a sample, by name.
pub type Labels = BTreeMap<String, String>;

/// A page.
#[derive(Debug, Default)]
pub struct Page {
    /// Type of each family.
    pub families: BTreeMap<String, String>,
    samples: BTreeMap<(String, Labels), f64>,
}

impl Page {
    /// Reads a page: `TYPE` and `HELP` before the samples of a family, every family once and in one
    /// piece, every sample once, histograms that add up.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line is not ended");
        let mut page = Self::default();
        let mut family = String::new();
        let mut helped = BTreeSet::new();
        for line in text.lines() {
            page.line(line, &mut family, &mut helped).with_context(|| line.to_owned())?;
        }
        ensure!(helped.len() == page.families.len(), "a family has no help");
        page.check_histograms()?;
        Ok(page)
    }

    fn line(
        &mut self,
        line: &str,
        family: &mut String,
        helped: &mut BTreeSet<String>,
    ) -> Result<()> {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').context("a type")?;
            ensure!(["gauge", "counter", "histogram"].contains(&kind), "an unknown type");
            ensure!(self.families.insert(name.into(), kind.into()).is_none(), "a family twice");
            family.clear();
            family.push_str(name);
            return Ok(());
        }
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, _) = rest.split_once(' ').context("a help text")?;
            ensure!(name == family, "the help of another family");
            ensure!(helped.insert(name.into()), "a help twice");
            return Ok(());
        }
        let (name, labels, value) = sample(line)?;
        let kind = self.families.get(family.as_str()).context("a sample before any family")?;
        let is_own = if kind == "histogram" {
            ["_bucket", "_sum", "_count"].iter().any(|part| name == format!("{family}{part}"))
        } else {
            name == *family
        };
        ensure!(is_own, "a sample of another family");
        ensure!(kind == "gauge" || value >= 0.0, "a negative count");
        ensure!(self.samples.insert((name, labels), value).is_none(), "a sample twice");
        Ok(())
    }

    /// Buckets grow, and the last is the count.
    fn check_histograms(&self) -> Result<()> {
        let mut buckets: BTreeMap<(&str, Labels), Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), value) in &self.samples {
            let Some(family) = name.strip_suffix("_bucket") else { continue };
            let mut labels = labels.clone();
            let limit = labels.remove("le").context("a bucket without le")?.parse()?;
            buckets.entry((family, labels)).or_default().push((limit, *value));
        }
        for ((family, labels), mut list) in buckets {
            list.sort_by(|a, b| a.0.total_cmp(&b.0));
            ensure!(list.is_sorted_by_key(|(_, count)| *count), "{labels:?}: {list:?}");
            let (limit, all) = *list.last().context("a bucket")?;
            ensure!(limit == f64::INFINITY, "{family}{labels:?} has no last bucket");
            let count = self.samples.get(&(format!("{family}_count"), labels.clone()));
            ensure!(count == Some(&all), "{family}{labels:?}: {count:?} instead of {all}");
            ensure!(self.samples.contains_key(&(format!("{family}_sum"), labels)), "no sum");
        }
        Ok(())
    }

    /// The one sample of this name that has at least these labels.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut found = self.all(name, labels);
        match (found.next(), found.next()) {
            (Some(value), None) => Ok(value),
            (None, _) => bail!("no {name}{labels:?}"),
            (Some(_), Some(_)) => bail!("{name}{labels:?} is more than one"),
        }
    }

    /// All samples of this name that have at least these labels.
    pub fn all(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = f64> {
        let has = |own: &Labels| {
            labels.iter().all(|(label, value)| own.get(*label).is_some_and(|v| v == value))
        };
        let own = self.samples.iter().filter(move |((n, l), _)| n == name && has(l));
        own.map(|(_, value)| *value)
    }

    /// The state that is set of a metric whose label has its own name.
    ///
    /// # Errors
    /// Not exactly one is set.
    pub fn state(&self, name: &str, labels: &[(&str, &str)]) -> Result<String> {
        let set = self.samples.iter().filter(|((n, l), value)| {
            n == name
                && **value == 1.0
                && labels.iter().all(|(k, v)| l.get(*k).is_some_and(|own| own == v))
        });
        let states: Vec<&String> = set.filter_map(|((_, l), _)| l.get(name)).collect();
        match states[..] {
            [state] => Ok(state.clone()),
            _ => bail!("{name}{labels:?}: {states:?}"),
        }
    }
}

fn is_name(text: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(is_first) && text.chars().all(|c| is_first(c) || c.is_ascii_digit())
}

fn sample(line: &str) -> Result<(String, Labels, f64)> {
    let end = line.find(['{', ' ']).context("a value")?;
    let (name, rest) = line.split_at(end);
    ensure!(is_name(name), "a name");
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Labels::new(), rest),
    };
    let value = rest.strip_prefix(' ').context("a blank")?.parse()?;
    Ok((name.to_owned(), labels, value))
}

fn labels(mut rest: &str) -> Result<(Labels, &str)> {
    let mut labels = Labels::new();
    loop {
        let (name, after) = rest.split_once("=\"").context("a label")?;
        ensure!(is_name(name), "a label's name");
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().context("the end of a value")? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next().context("an escape")?.1 {
                    'n' => '\n',
                    c @ ('\\' | '"') => c,
                    _ => bail!("an unknown escape"),
                }),
                (_, c) => value.push(c),
            }
        };
        ensure!(labels.insert(name.to_owned(), value).is_none(), "a label twice");
        rest = after.get(end + 1..).context("more")?;
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        rest = rest.strip_prefix(',').context("a comma")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_none() {
        let head = "# TYPE a gauge\n# HELP a x\n";
        let page = Page::parse(&format!("{head}a{{b=\"c\\\\\\\"\\n\"}} 1.5\n")).unwrap();
        assert_eq!(page.value("a", &[("b", "c\\\"\n")]).unwrap(), 1.5);
        let bucket = "# TYPE h histogram\n# HELP h x\nh_sum 1\n";
        for bad in [
            "a 1\n".to_owned(),
            format!("{head}b 1\n"),
            format!("{head}a 1\na 2\n"),
            format!("{head}a 1"),
            format!("{head}a one\n"),
            format!("{head}a{{b=c}} 1\n"),
            format!("{head}a{{b=\"c\" 1\n"),
            format!("{head}{head}"),
            "# TYPE a gauge\na 1\n".to_owned(),
            format!("{bucket}h_bucket{{le=\"1\"}} 2\nh_bucket{{le=\"+Inf\"}} 1\nh_count 1\n"),
            format!("{bucket}h_bucket{{le=\"1\"}} 1\nh_count 1\n"),
            format!("{bucket}h_bucket{{le=\"+Inf\"}} 1\nh_count 2\n"),
        ] {
            assert!(Page::parse(&bad).is_err(), "{bad}");
        }
    }
}
