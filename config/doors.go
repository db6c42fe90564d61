package config

import (
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
)

// Doors that a gateway can open for other programs.
const (
	DoorACME   = "acme"
	DoorEST    = "est"
	DoorStatus = "status"
	DoorBundle = "bundle"
)

var allDoors = []string{DoorACME, DoorEST, DoorStatus, DoorBundle}

// Doors is a list of doors, separated by ";".
type Doors []string

// UnmarshalText reads the list; off is none.
func (d *Doors) UnmarshalText(b []byte) error {
	*d = nil
	for _, p := range split(string(b)) {
		if p == off {
			continue
		}
		door, err := oneOf(p, allDoors...)
		if err != nil {
			return err
		}
		if !slices.Contains(*d, door) {
			*d = append(*d, door)
		}
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (d Doors) MarshalText() ([]byte, error) {
	if len(d) == 0 {
		return []byte(off), nil
	}
	return []byte(strings.Join(d, ";")), nil
}

// Has tells whether a door is open.
func (d Doors) Has(door string) bool { return slices.Contains(d, door) }

// NameRule says which names may be certified, and for clients of which nodes.
type NameRule struct {
	Glob     string // over a host name in lower case, or over an address
	Selector string // over the tags that operators and join codes gave a node; empty: no node is asked for
}

// NameRules is a list of "glob[@selector]", separated by ";".
type NameRules []NameRule

// UnmarshalText reads the list.
func (l *NameRules) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		if p == none {
			continue
		}
		glob, selector, limited := strings.Cut(p, "@")
		glob, selector = strings.ToLower(strings.TrimSpace(glob)), strings.TrimSpace(selector)
		if _, err := path.Match(glob, "a"); err != nil || glob == "" || strings.Contains(glob, "/") || limited && selector == "" {
			return fmt.Errorf("%s is not accepted; want names with *, ? and [a-z], each with @selector behind it if it is for the nodes with these tags only, separated by ;, or none", quote(p))
		}
		*l = append(*l, NameRule{glob, selector})
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l NameRules) MarshalText() ([]byte, error) {
	return join(l, none, func(r NameRule) string { return with(r.Glob, "@", r.Selector) })
}

// BaseURL is an http or https URL without query.
type BaseURL string

// UnmarshalText accepts http://host[:port][/path] and the same with https.
func (u *BaseURL) UnmarshalText(b []byte) error {
	v, err := url.Parse(string(b))
	if err != nil || v.Scheme != "http" && v.Scheme != "https" || v.Host == "" || v.User != nil || v.RawQuery != "" || v.Fragment != "" {
		return fmt.Errorf("%s is not accepted; want http://host[:port], as clients reach it", quote(string(b)))
	}
	*u = BaseURL(strings.TrimSuffix(string(b), "/"))
	return nil
}

// checkDoors finds what does not fit together.
func (c *Gateway) checkDoors() error {
	if !serviceName.MatchString(c.DoorsName) || !strings.Contains(c.DoorsName, ".") {
		return wrong("SALLYPORT_GATEWAY_DOORS_NAME", "%s is not accepted; want a host name in lower case with a dot in it", quote(c.DoorsName))
	}
	if c.DoorsListen != "" && !c.Doors.Has(DoorStatus) {
		return wrong("SALLYPORT_GATEWAY_DOORS_LISTEN", "is set, but SALLYPORT_GATEWAY_DOORS does not open status: nothing would be served there")
	}
	if len(c.Doors) == 0 {
		return nil
	}
	if _, taken := c.Accept.Find(c.DoorsName); taken {
		return wrong("SALLYPORT_GATEWAY_DOORS_NAME", "%s is a service of SALLYPORT_GATEWAY_ACCEPT already", quote(c.DoorsName))
	}
	if c.Doors.Has(DoorACME) && len(c.DoorsAllow) == 0 {
		return wrong("SALLYPORT_GATEWAY_DOORS_ALLOW", "is empty: the ACME door would certify no name; say which ones it may, such as *.plant.example@site=plant")
	}
	return nil
}
