package config

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// off switches an optional listener off whose default is on.
const off = "off"

// Listen is one address to listen on; empty means that nothing listens.
type Listen string

// UnmarshalText accepts host:port, :port and off.
func (l *Listen) UnmarshalText(b []byte) error {
	s := string(b)
	if s == off {
		*l = ""
		return nil
	}
	if err := checkAddr(s, true); err != nil {
		return err
	}
	*l = Listen(s)
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l Listen) MarshalText() ([]byte, error) {
	if l == "" {
		return []byte(off), nil
	}
	return []byte(l), nil
}

// Side limits who may connect to one address of an RCP.
type Side string

// The sides. An address without one serves both.
const (
	Upstream   Side = "upstream"
	Downstream Side = "downstream"
)

// SideListen is one address with the side that it serves.
type SideListen struct {
	Addr string
	Side Side // empty: both
}

// SideListens is a list of addresses, separated by ";".
type SideListens []SideListen

// UnmarshalText reads "addr;addr@upstream;addr@downstream".
func (l *SideListens) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		addr, side, limited := strings.Cut(p, "@")
		if err := checkAddr(addr, true); err != nil {
			return err
		}
		if limited {
			if _, err := oneOf(side, string(Upstream), string(Downstream)); err != nil {
				return fmt.Errorf("%s: after the @: %w", quote(p), err)
			}
		}
		*l = append(*l, SideListen{Addr: addr, Side: Side(side)})
	}
	if len(*l) == 0 {
		return fmt.Errorf("%s names no address; want host:port or :port, separated by ;", quote(string(b)))
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l SideListens) MarshalText() ([]byte, error) {
	return join(l, "", func(a SideListen) string { return with(a.Addr, "@", string(a.Side)) })
}

// Endpoint is a peer: an address to dial, a UUID that it must prove, or both.
type Endpoint struct {
	Addr string // host:port; empty: it dials us
	ID   string // canonical UUID; empty: any of its role
}

func (e Endpoint) String() string {
	switch {
	case e.Addr == "":
		return e.ID
	case e.ID == "":
		return e.Addr
	}
	return e.Addr + "," + e.ID
}

// Endpoints is a list of "host:port[,uuid]", separated by ";".
type Endpoints []Endpoint

// UnmarshalText reads the list. A part that is only a UUID is an endpoint
// without an address; settings that need one refuse it afterwards.
func (l *Endpoints) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		if id, err := parseUUID(p); err == nil {
			*l = append(*l, Endpoint{ID: id})
			continue
		}
		addr, id, pinned := strings.Cut(p, ",")
		e := Endpoint{Addr: strings.TrimSpace(addr)}
		if err := checkAddr(e.Addr, false); err != nil {
			return err
		}
		if pinned {
			var err error
			if e.ID, err = parseUUID(strings.TrimSpace(id)); err != nil {
				return fmt.Errorf("%s: %w; want host:port[,uuid], separated by ;", quote(p), err)
			}
		}
		*l = append(*l, e)
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l Endpoints) MarshalText() ([]byte, error) {
	return join(l, "", Endpoint.String)
}

// Dialled returns those that have an address.
func (l Endpoints) Dialled() []Endpoint {
	var out []Endpoint
	for _, e := range l {
		if e.Addr != "" {
			out = append(out, e)
		}
	}
	return out
}

// needAddresses refuses a bare UUID where only dialling makes sense.
func (l Endpoints) needAddresses(variable string) error {
	for _, e := range l {
		if e.Addr == "" {
			return wrong(variable, "%s is a UUID without an address; want host:port[,uuid], separated by ;", quote(e.ID))
		}
	}
	return nil
}

func parseUUID(s string) (string, error) {
	u, err := uuid.Parse(s)
	if err != nil || len(s) != 36 {
		return "", fmt.Errorf("%s is not a UUID", quote(s))
	}
	return u.String(), nil
}

// CheckAddr accepts host:port as something to dial.
func CheckAddr(s string) error { return checkAddr(s, false) }

// checkAddr accepts host:port with a numeric port. Only a listener may leave
// the host out, or ask for port 0.
func checkAddr(s string, listen bool) error {
	want := "want host:port, such as rcp.example.com:9090"
	if listen {
		want = "want host:port or :port, such as 127.0.0.1:9090"
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		if strings.Count(s, ":") > 1 {
			want += ", and an IPv6 address in brackets: [2001:db8::1]:9090"
		}
		return fmt.Errorf("%s is not an address; %s", quote(s), want)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || (n == 0 && !listen) {
		return fmt.Errorf("%s has no usable port; %s", quote(s), want)
	}
	if host == "" && !listen {
		return fmt.Errorf("%s has no host; %s", quote(s), want)
	}
	if strings.ContainsAny(host, " /@,\t\n") {
		return fmt.Errorf("%s is not an address; %s", quote(s), want)
	}
	return nil
}

// URL is where operators find a gateway: unix:///path or https://host:port.
type URL string

// UnmarshalText accepts the two forms, and refuses http:// by name: a token
// must not travel in clear.
func (u *URL) UnmarshalText(b []byte) error {
	s := string(b)
	v, err := url.Parse(s)
	const want = "want https://host:port or unix:///path/to/api.sock"
	switch {
	case err != nil:
		return fmt.Errorf("%s is not a URL; %s", quote(s), want)
	case v.Scheme == "http":
		return fmt.Errorf("http:// is refused: a token would travel in clear; %s", want)
	case v.Scheme == "https" && v.Host != "" && v.User == nil:
	case v.Scheme == "unix" && v.Host == "" && strings.HasPrefix(v.Path, "/"):
	default:
		return fmt.Errorf("%s is not accepted; %s", quote(s), want)
	}
	*u = URL(strings.TrimRight(s, "/"))
	return nil
}
