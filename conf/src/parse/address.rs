//! Addresses. Spec: config-and-drbdadm.md §3 `addr`, §6.4 "IP".

use bstr::{BString, ByteSlice};

use super::{Form, Parsed, Parser};
use crate::keyword::Keyword;
use crate::lex::{Kind, Token};
use crate::model::{Address, Family, Span};
use crate::options::Unit;

impl Parser<'_> {
    /// `[family] address : port`, without what follows.
    pub(super) fn address(&mut self, span: Span) -> Parsed<Address> {
        let token = self.next();
        let (family, addr) = match token.kind {
            Kind::Ipv4 => (Family::Ipv4, token),
            Kind::Key(Keyword::Ipv4) => (Family::Ipv4, self.ipv4_after_family()?),
            Kind::Key(Keyword::Ssocks | Keyword::Sci) => {
                (Family::Ssocks, self.ipv4_after_family()?)
            }
            Kind::Key(Keyword::Sdp) => (Family::Sdp, self.ipv4_after_family()?),
            Kind::Key(Keyword::Ipv6) => {
                self.punct(b'[')?;
                let addr = self.next();
                if addr.kind != Kind::Ipv6 {
                    return Err(self.expected("TK_IPADDR6", &addr, Form::Numbered));
                }
                self.punct(b']')?;
                (Family::Ipv6, addr)
            }
            _ => {
                let what = "ssocks | sdp | ipv4 | ipv6 | <ipv4 address> ";
                return Err(self.expected(what, &token, Form::Plain));
            }
        };
        self.check_groups(family, &addr);
        self.punct(b':')?;
        let port = self.number()?;
        self.range("port", &port, Unit::One, 1, 65_535)?;
        Ok(Address { family, addr: addr.text, port: port.text, span })
    }

    fn ipv4_after_family(&mut self) -> Parsed<Token> {
        let token = self.next();
        if token.kind == Kind::Ipv4 {
            return Ok(token);
        }
        Err(self.expected("TK_IPADDR", &token, Form::Numbered))
    }

    /// The original takes groups like 999 and 001; they never work.
    fn check_groups(&mut self, family: Family, addr: &Token) {
        if family == Family::Ipv6 || self.is_show() {
            return;
        }
        let good = addr.text.to_str().is_ok_and(|t| t.parse::<std::net::Ipv4Addr>().is_ok());
        if !good {
            self.later(&format!("'{}' is not an IPv4 address", addr.text));
        }
    }

    /// Claims `addr:port` for all files; loopback addresses count for each host by itself.
    pub(super) fn unique_address(&mut self, address: &Address, hosts: &[BString]) -> Parsed {
        let key = bstr::concat([address.addr.as_slice(), b":", address.port.as_slice()]);
        if !is_loopback(address) {
            return self.unique("IP", key.as_bstr(), address.span);
        }
        for host in hosts {
            let key = bstr::concat([host.as_slice(), b":", key.as_slice()]);
            self.unique("IP", key.as_bstr(), address.span)?;
        }
        Ok(())
    }
}

fn is_loopback(address: &Address) -> bool {
    match address.family {
        Family::Ipv6 => address.addr == "::1",
        _ => address.addr.starts_with(b"127."),
    }
}
