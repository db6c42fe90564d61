package policy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/config"
	"sallyport/internal/wire"
)

func allow(t *testing.T, patterns string) config.HostPorts {
	t.Helper()
	var l config.HostPorts
	if err := l.UnmarshalText([]byte(patterns)); err != nil {
		t.Fatal(err)
	}
	return l
}

// names is a name server.
type names map[string][]string

func (n names) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, a := range n[host] {
		out = append(out, netip.MustParseAddr(a))
	}
	if out == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return out, nil
}

func TestReachMatrix(t *testing.T) {
	dns := names{
		"db.example.com": {"10.0.0.5"}, "evil.example.com": {"169.254.169.254"}, "local": {"127.0.0.1", "::1"},
		"mapped": {"::ffff:10.0.0.5"}, "six": {"2001:db8::7"}, "ll": {"fe80::1"}, "nowhere": {"0.0.0.0"},
	}
	for _, c := range []struct {
		allow, target string
		want          string // what would be dialled; empty: refused
	}{
		{"none", "10.0.0.5:80", ""},
		{"none", "db.example.com:80", ""},
		{"*", "10.0.0.5:80", "10.0.0.5:80"},
		{"*", "db.example.com:5432", "10.0.0.5:5432"},
		{"*", "local:1", "127.0.0.1:1 [::1]:1"},
		{"10.0.0.5:80", "10.0.0.5:80", "10.0.0.5:80"},
		{"10.0.0.5:80", "10.0.0.5:81", ""},
		{"10.0.0.?:80", "10.0.0.5:80", "10.0.0.5:80"},
		{"10.0.0.?:80", "10.0.0.50:80", ""},
		{"10.0.*:4*", "10.0.9.9:443", "10.0.9.9:443"},
		{"[2001:db8::*]:443", "[2001:db8::7]:443", "[2001:db8::7]:443"},
		{"[2001:DB8:0::7]:443", "[2001:db8::7]:443", "[2001:db8::7]:443"},
		{"10.0.0.5:80", "[::ffff:10.0.0.5]:80", "10.0.0.5:80"},
		// A name needs both: itself, and what it leads to.
		{"db.example.com:5432", "db.example.com:5432", ""},
		{"10.0.0.5:5432", "db.example.com:5432", ""},
		{"db.example.com:5432;10.0.0.5:5432", "db.example.com:5432", "10.0.0.5:5432"},
		{"*.example.com:*;10.*:5432", "DB.example.com.:5432", "10.0.0.5:5432"},
		{"*.example.com:*;10.*:5432", "db.example.com:22", ""},
		{"mapped:1;10.0.0.5:1", "mapped:1", "10.0.0.5:1"},
		{"six:1;[2001:db8::7]:1", "six:1", "[2001:db8::7]:1"},
		{"local:1;127.0.0.1:1", "local:1", "127.0.0.1:1"},
		// Link-local and metadata addresses need their own name.
		{"*", "169.254.169.254:80", ""},
		{"*", "evil.example.com:80", ""},
		{"*;169.254.*:80", "169.254.169.254:80", ""},
		{"169.254.169.25?:80", "169.254.169.254:80", ""},
		{"169.254.169.254:*", "169.254.169.254:80", "169.254.169.254:80"},
		{"169.254.169.254:*", "169.254.169.253:80", ""},
		{"*;169.254.169.254:80", "evil.example.com:80", "169.254.169.254:80"},
		{"*", "[::ffff:169.254.169.254]:80", ""},
		{"*", "[64:ff9b::a9fe:a9fe]:80", ""},
		{"*", "[::a9fe:a9fe]:80", ""},
		{"*", "[fd00:ec2::254]:80", ""},
		{"[fd00:ec2::254]:80", "[fd00:ec2::254]:80", "[fd00:ec2::254]:80"},
		{"*", "100.100.100.200:80", ""},
		{"*", "168.63.129.16:80", ""},
		{"*", "[fe80::1]:80", ""},
		{"*", "[fe80::1%eth0]:80", ""},
		{"[fe80::1]:80", "[fe80::1%eth0]:80", "[fe80::1%eth0]:80"},
		{"[fe80::1%eth0]:80", "[fe80::1%eth1]:80", ""},
		{"*", "ll:80", ""},
		{"*", "169.254.169.254.:80", ""},
		// Addresses of nobody or of everybody: on Linux 0.0.0.0 is this host.
		{"*", "0.0.0.0:80", ""},
		{"*", "[::]:80", ""},
		{"*", "nowhere:80", ""},
		{"*", "224.0.0.1:80", ""},
		{"*", "255.255.255.255:80", ""},
		{"*", "[ff02::1]:80", ""},
	} {
		r := &Reach{Allow: allow(t, c.allow), Lookup: dns.lookup}
		got, err := r.resolve(t.Context(), c.target)
		var shown []string
		for _, a := range got {
			shown = append(shown, a.String())
		}
		if strings.Join(shown, " ") != c.want || (c.want == "") != errors.Is(err, ErrNotAllowed) {
			t.Errorf("%s with %s: %v, %v; want %s", c.target, c.allow, shown, err, c.want)
		}
		if err != nil && c.want == "" && !strings.Contains(err.Error(), targetsVariable) && !strings.Contains(err.Error(), "no single host") {
			t.Errorf("%s: the error does not say what to change: %v", c.target, err)
		}
	}
}

// TestReachRebinding: the name server answers with an allowed address when the
// policy is applied, and with another when it is dialled.
func TestReachRebinding(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	answers := [][]string{{"10.9.9.9"}, {"127.0.0.1"}, {"169.254.169.254"}, {"10.9.9.9", "127.0.0.1"}}
	asked := 0
	r := &Reach{Allow: allow(t, "svc:*;10.9.*:*"), Lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
		answer := names{host: answers[asked]}
		asked++
		return answer.lookup(ctx, host)
	}}
	spec := wire.TargetSpec{Address: net.JoinHostPort("svc", port)}
	if err := r.check(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if c, err := r.Dial(t.Context(), spec); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("%v, %v", c, err)
		}
	}
	// One of two is allowed: only that is tried, and the name is not asked again.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if c, err := r.Dial(ctx, spec); err == nil || strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("%v, %v", c, err)
	}
	if asked != 4 {
		t.Errorf("asked %d times", asked)
	}
}

func TestReachDialsNextAddress(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r := &Reach{Allow: allow(t, "*"), Lookup: names{"svc": {"127.0.0.2", "127.0.0.1"}}.lookup} // nobody listens at the first
	c, err := r.Dial(t.Context(), wire.TargetSpec{Address: "svc:" + port})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestTargetPolicy(t *testing.T) {
	h := newHost(t)
	dns := names{"db": {"10.0.0.5"}, "bad": {"10.66.0.1"}}
	h.cfg.Reach = &Reach{Allow: allow(t, "db:5432;bad:*;later:*;10.0.0.*:*"), Lookup: dns.lookup}
	h.open()
	target := func(name, address string) doc {
		return doc{name, wire.PolicyTarget, wire.TargetSpec{Address: address}}
	}
	st := h.apply(target("a", "db:5432"), target("b", "db:22"), target("c", "bad:80"), target("d", "later:80"), target("ping", "db:5432"),
		target("e", "db"), doc{"f", wire.PolicyTarget, map[string]string{"where": "db:5432"}})
	state(t, st["a"], wire.PolicyApplied, "")
	state(t, st["b"], wire.PolicyFailed, "SALLYPORT_NODE_ALLOW_TARGETS does not allow db:22")
	state(t, st["c"], wire.PolicyFailed, "bad resolves to 10.66.0.1: refused by the node's configuration: SALLYPORT_NODE_ALLOW_TARGETS does not allow 10.66.0.1:80")
	state(t, st["d"], wire.PolicyApplied, "") // it does not resolve now; it may when it is dialled
	state(t, st["ping"], wire.PolicyFailed, "of its own")
	state(t, st["e"], wire.PolicyFailed, "host:port")
	state(t, st["f"], wire.PolicyFailed, "where")
	spec, gone, ok := h.e.Target("a")
	if !ok || spec.Address != "db:5432" {
		t.Fatalf("%+v, %v", spec, ok)
	}
	for _, name := range []string{"b", "c", "ping", "e", "f", "nobody"} {
		if _, _, ok := h.e.Target(name); ok {
			t.Errorf("%s is a target", name)
		}
	}
	h.apply(target("a", "db:5432"))
	select {
	case <-gone.Done():
		t.Error("the same again cut its connections")
	default:
	}
	h.open() // a restart keeps it
	if spec, gone, ok = h.e.Target("a"); !ok || spec.Address != "db:5432" {
		t.Fatalf("%+v, %v", spec, ok)
	}
	// What fails keeps the last that worked.
	state(t, h.apply(target("a", "db:22"))["a"], wire.PolicyFailed, "db:22")
	if spec, _, ok = h.e.Target("a"); !ok || spec.Address != "db:5432" {
		t.Errorf("%+v, %v", spec, ok)
	}
	state(t, h.apply(target("a", "10.0.0.9:1"))["a"], wire.PolicyApplied, "")
	<-gone.Done()
	if spec, gone, ok = h.e.Target("a"); !ok || spec.Address != "10.0.0.9:1" {
		t.Errorf("%+v, %v", spec, ok)
	}
	h.apply()
	<-gone.Done()
	if _, _, ok = h.e.Target("a"); ok {
		t.Error("a removed target is offered")
	}
}

// TestTargetsWaitForNoNameServer: hundreds of names and a name server that
// does not answer hold up nothing.
func TestTargetsWaitForNoNameServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Reach{Allow: allow(t, "*"), Lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		start := time.Now()
		for range 500 {
			if err := r.check(t.Context(), wire.TargetSpec{Address: "db:1"}); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took > 2*lookupTimeout {
			t.Errorf("took %v", took)
		}
		if err := r.check(t.Context(), wire.TargetSpec{Address: "169.254.169.254:80"}); !errors.Is(err, ErrNotAllowed) {
			t.Error(err)
		}
	})
}

func FuzzGlob(f *testing.F) {
	f.Add("*.example.com", "a.example.com")
	f.Add("a*b?c*", "aXbYcZ")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 64 || len(s) > 64 {
			return
		}
		if got, want := glob(pattern, s), slowGlob(pattern, s); got != want {
			t.Fatalf("%q, %q: %v", pattern, s, got)
		}
		if !strings.ContainsAny(s, "*?") && !glob(s, s) {
			t.Fatalf("%q does not match itself", s)
		}
	})
}

// slowGlob fills a table.
func slowGlob(pattern, s string) bool {
	row := make([]bool, len(s)+1)
	row[0] = true
	for _, p := range []byte(pattern) {
		next := make([]bool, len(s)+1)
		next[0] = p == '*' && row[0]
		for j := range len(s) {
			switch p {
			case '*':
				next[j+1] = row[j+1] || next[j]
			default:
				next[j+1] = row[j] && (p == '?' || p == s[j])
			}
		}
		row = next
	}
	return row[len(s)]
}
