package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// HostPort is a pattern of destinations. In both parts "*" is any text and "?"
// any character; there are no character classes, because IPv6 addresses stand
// in brackets.
type HostPort struct {
	Host string // lower case, without brackets and without a dot at the end
	Port string
}

func (p HostPort) String() string { return net.JoinHostPort(p.Host, p.Port) }

// Addr is the address that the pattern names literally, if it does.
func (p HostPort) Addr() (netip.Addr, bool) {
	a, err := netip.ParseAddr(p.Host)
	return a, err == nil
}

// HostPorts is a list of patterns, separated by ";". An empty list matches
// nothing; "*" alone is every host and port.
type HostPorts []HostPort

// UnmarshalText reads "db.example.com:5432;*.lan:443;[2001:db8::*]:80".
func (l *HostPorts) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		if p == none {
			continue
		}
		if p == "*" {
			p = "*:*"
		}
		host, port, err := net.SplitHostPort(p)
		if err != nil || host == "" || strings.ContainsAny(host, " /@,[]\t\n") || !portPattern(port) {
			return fmt.Errorf("%s is not accepted; want host:port with * and ?, an IPv6 address in brackets, separated by ;, or * or none", quote(p))
		}
		host = strings.TrimSuffix(strings.ToLower(host), ".")
		if a, err := netip.ParseAddr(host); err == nil {
			host = a.Unmap().String() // one form for one address
		}
		*l = append(*l, HostPort{host, port})
	}
	return nil
}

// portPattern accepts a number from 1 to 65535, or digits with wildcards.
func portPattern(s string) bool {
	if s == "" || len(s) > 5 || strings.Trim(s, "0123456789*?") != "" {
		return false
	}
	if strings.ContainsAny(s, "*?") {
		return true
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0 && s[0] != '0'
}

// MarshalText writes a form that UnmarshalText reads.
func (l HostPorts) MarshalText() ([]byte, error) {
	return join(l, none, HostPort.String)
}

// Any reports whether everything is allowed but what must be named literally.
func (l HostPorts) Any() bool { return slices.Contains(l, HostPort{"*", "*"}) }
