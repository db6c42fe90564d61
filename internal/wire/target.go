package wire

import (
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// PolicyTarget is the type of a policy that offers a service which the node
// can reach. The policy's name is the target's name.
const PolicyTarget = "target"

// Targets that every node has: HTTP, answered inside the node. They reach
// nothing, so nothing needs to allow them.
const (
	TargetPing = "ping" // any method: 200 and a small JSON document
	TargetEcho = "echo" // the request's body comes back as it goes in
)

// Schemes of targets, as [TargetSpec.Scheme] returns them.
const (
	SchemeTCP   = "tcp"   // bytes
	SchemeHTTP  = "http"  // HTTP/1.1
	SchemeHTTPS = "https" // HTTP/1.1 inside TLS, which the node speaks: the tunnel carries plain HTTP
	SchemeH2C   = "h2c"   // HTTP/2 with prior knowledge, without TLS: gRPC
)

// Limits of a target.
const (
	DefaultTargetTimeout = Duration(100 * time.Second)
	MaxTargetTimeout     = Duration(24 * time.Hour)
	maxTargetText        = 2048 // bytes of an address or URL
)

// TargetSpec is the spec of a policy of type target: either an Address, or a URL.
type TargetSpec struct {
	Address string `json:"address,omitempty"` // host:port of a TCP service
	URL     string `json:"url,omitempty"`     // http, https or h2c; a path goes before that of each request
	// Timeout is how long an HTTP service may take until its response headers;
	// DefaultTargetTimeout if 0.
	Timeout Duration `json:"timeout,omitempty"`
}

// IsBuiltinTarget tells whether every node has a target of that name.
func IsBuiltinTarget(name string) bool { return name == TargetPing || name == TargetEcho }

// Validate refuses what no node could reach.
func (s TargetSpec) Validate() error {
	switch {
	case s.Address == "" && s.URL == "":
		return specError("address", "either an address (host:port) or a url is needed")
	case s.Address != "" && s.URL != "":
		return specError("url", "an address and a url stand there; a target has one of them")
	case s.Address != "" && s.Timeout != 0:
		return specError("timeout", "only a target with a url has one")
	case s.Timeout < 0 || s.Timeout > MaxTargetTimeout:
		return specError("timeout", "%v is longer than %v", s.Timeout, MaxTargetTimeout)
	case s.Address != "":
		return validHostPort("address", s.Address)
	}
	return validTargetURL(s.URL)
}

func validTargetURL(text string) error {
	if len(text) > maxTargetText {
		return specError("url", "%d bytes are above the limit of %d", len(text), maxTargetText)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil: // its text would repeat the URL, with what secrets it holds
		return specError("url", "it is not a URL; want http://host[:port][/path], https:// or h2c://")
	case u.User != nil:
		return specError("url", "it holds credentials, which everybody who reads the policy would see; the client of the target sends them")
	case targetPorts[u.Scheme] == "":
		return specError("url", "scheme %q is not supported; want http, https or h2c", Quotable(u.Scheme))
	case u.Opaque != "" || u.Host == "":
		return specError("url", "%q has no host; want http://host[:port][/path]", Quotable(text))
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(text, "#"):
		return specError("url", "%q has a query or a fragment; want http://host[:port][/path]", Quotable(text))
	case strings.HasSuffix(u.Host, ":"):
		return specError("url", "%q has no port behind the colon", Quotable(text))
	}
	return validHostPort("url", TargetSpec{URL: text}.HostPort())
}

// targetPorts are the default ports.
var targetPorts = map[string]string{SchemeHTTP: "80", SchemeHTTPS: "443", SchemeH2C: "80"}

// Scheme says what the service speaks. The spec must be valid.
func (s TargetSpec) Scheme() string {
	scheme, _, ok := strings.Cut(s.URL, ":")
	if !ok {
		return SchemeTCP
	}
	return strings.ToLower(scheme)
}

// HTTP tells whether requests can be relayed to the target, not just bytes.
func (s TargetSpec) HTTP() bool { return s.URL != "" }

// HostPort is what the node dials, with the port of the scheme where the URL
// names none. The spec must be valid.
func (s TargetSpec) HostPort() string {
	if s.URL == "" {
		return s.Address
	}
	u, err := url.Parse(s.URL)
	if err != nil {
		return ""
	}
	port := u.Port()
	if port == "" {
		port = targetPorts[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// validHostPort accepts a name or a literal address, and a port from 1 on.
func validHostPort(field, s string) error {
	if len(s) > maxTargetText {
		return specError(field, "%d bytes are above the limit of %d", len(s), maxTargetText)
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return specError(field, "%q is not host:port (an IPv6 address stands in brackets)", Quotable(s))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] == '0' {
		return specError(field, "%q is not a port from 1 to 65535", Quotable(port))
	}
	if strings.Contains(host, ":") {
		if _, err := netip.ParseAddr(host); err != nil {
			return specError(field, "%q is not an IPv6 address", Quotable(host))
		}
		return nil
	}
	if !hostName(host) {
		return specError(field, "%q is neither a host name nor an address", Quotable(host))
	}
	return nil
}

// hostName accepts letters, digits, '-' and '_' in labels of 1 to 63 (RFC 1035,
// with the underscore that many networks use), which holds IPv4 addresses too.
func hostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}
