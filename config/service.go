package config

import (
	"fmt"
	"regexp"
	"strings"
)

// Service is something in the trusted network that clients outside may reach.
type Service struct {
	Name string // that clients ask for
	Addr string // where it is; no client ever names it
}

// Services is a list of "name=host:port", separated by ";".
type Services []Service

var serviceName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// UnmarshalText reads the list.
func (l *Services) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		name, addr, ok := strings.Cut(p, "=")
		name, addr = strings.TrimSpace(name), strings.TrimSpace(addr)
		if !ok || !serviceName.MatchString(name) {
			return fmt.Errorf("%s is not a service; want name=host:port with a name of a-z, 0-9, '-' and '.', separated by ;", quote(p))
		}
		if err := checkAddr(addr, false); err != nil {
			return fmt.Errorf("service %s: %w", name, err)
		}
		if _, twice := l.Find(name); twice {
			return fmt.Errorf("service %s stands there twice", name)
		}
		*l = append(*l, Service{name, addr})
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l Services) MarshalText() ([]byte, error) {
	return join(l, "", func(s Service) string { return s.Name + "=" + s.Addr })
}

// Find returns the service of a name in lower case.
func (l Services) Find(name string) (Service, bool) {
	for _, s := range l {
		if s.Name == name {
			return s, true
		}
	}
	return Service{}, false
}
