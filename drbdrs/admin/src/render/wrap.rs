//! Line wrapping of the status output. Spec: status-and-integration.md §2.4.

/// Text that is broken between pieces.
#[derive(Debug)]
pub(super) struct Wrap {
    text: String,
    column: usize,
    width: usize,
}

impl Wrap {
    pub(super) const fn new(width: usize) -> Self {
        Self { text: String::new(), column: 0, width }
    }

    /// Appends a piece, on a new line with this indentation if it does not fit.
    ///
    /// An explicit line end that comes exactly at the edge leaves the blank of the next piece in
    /// front of it, as in the original; programs that read it know that form.
    pub(super) fn piece(&mut self, indent: usize, piece: &str) {
        let mut piece = piece;
        if self.column + piece.len() > self.width {
            self.text.push('\n');
            self.column = 0;
            piece = piece.strip_prefix('\n').unwrap_or(piece);
        }
        if self.column == 0 {
            piece = piece.trim_start_matches(' ');
            self.text.extend(std::iter::repeat_n(' ', indent));
            self.column = indent;
        }
        self.text.push_str(piece);
        self.column += piece.len();
        if piece.ends_with('\n') {
            self.column = 0;
        }
    }

    /// An explicit line end.
    pub(super) fn line_end(&mut self, indent: usize) {
        self.piece(indent, "\n");
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(pieces: &[(usize, &str)]) -> String {
        let mut wrap = Wrap::new(10);
        for (indent, piece) in pieces {
            wrap.piece(*indent, piece);
        }
        wrap.into_text()
    }

    #[test]
    fn pieces_that_do_not_fit_begin_a_line() {
        assert_eq!(wrapped(&[(0, "12345"), (4, " 7890")]), "12345 7890");
        assert_eq!(wrapped(&[(0, "123456"), (4, " 7890")]), "123456\n    7890");
        assert_eq!(wrapped(&[(2, " 12"), (4, "\n"), (4, " 7")]), "  12\n    7");
    }

    #[test]
    fn an_explicit_end_at_the_edge_keeps_a_blank() {
        assert_eq!(wrapped(&[(0, "1234567890"), (4, "\n"), (4, " 7")]), "1234567890\n     7");
    }
}
