package arch

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"
)

// The roles. A role meets another on the wire, in cmd, or in a test under tests/.
var roles = []string{"gateway", "rcp", "node", "pki"}

// A rule returns one line per violation.
type rule func([]source) []string

// rolesApart: roles never import roles, not even in their tests. The REST
// types and client in gateway/api are the gateway's door for everybody else;
// a role still has no use for them.
func rolesApart(files []source) (bad []string) {
	for _, f := range files {
		for _, role := range roles {
			if !f.in(role) {
				continue
			}
			for _, imp := range f.imports() {
				for _, other := range roles {
					if other != role && within(imp, module+"/"+other) {
						bad = append(bad, fmt.Sprintf("%s imports %s: roles never import roles", f.name, imp))
					}
				}
			}
		}
	}
	return bad
}

// shared: what the roles share never imports a role, nor cmd.
func shared(files []source) (bad []string) {
	for _, f := range files {
		if !f.in("internal", "config") || f.in("internal/cli") {
			continue
		}
		for _, imp := range f.imports() {
			for _, tree := range append(slices.Clone(roles), "cmd", "tests") {
				if within(imp, module+"/"+tree) {
					bad = append(bad, fmt.Sprintf("%s imports %s: imports point down", f.name, imp))
				}
			}
		}
	}
	return bad
}

// only: the packages below the given import paths are imported by one tree alone.
func only(tree string, foreign ...string) rule {
	return func(files []source) (bad []string) {
		for _, f := range files {
			if f.in(tree) {
				continue
			}
			for _, imp := range f.imports() {
				for _, p := range foreign {
					if within(imp, p) {
						bad = append(bad, fmt.Sprintf("%s imports %s: only %s does", f.name, imp, tree))
					}
				}
			}
		}
		return bad
	}
}

// leaf: the trees import nothing of ours.
func leaf(trees ...string) rule {
	return func(files []source) (bad []string) {
		for _, f := range files {
			if !f.in(trees...) || f.test() {
				continue
			}
			for _, imp := range f.imports() {
				if within(imp, module) && imp != f.pkg {
					bad = append(bad, fmt.Sprintf("%s imports %s: it imports nothing of ours", f.name, imp))
				}
			}
		}
		return bad
	}
}

// verifyConnection: VerifyPeerCertificate is skipped on resumption, so that a
// revoked peer with a ticket would come in.
func verifyConnection(files []source) (bad []string) {
	for _, f := range files {
		if f.in("tests/arch") {
			continue
		}
		for _, place := range f.identifiers("VerifyPeerCertificate") {
			bad = append(bad, place+": VerifyPeerCertificate is skipped on resumption; use VerifyConnection")
		}
	}
	return bad
}

// skipVerify: an enrolling party has no trust bundle yet and verifies the pin
// of its join code by hand. Nobody else may switch verification off; tests may
// play an attacker.
func skipVerify(files []source) (bad []string) {
	for _, f := range files {
		if f.test() || f.in("tests") {
			continue
		}
		enrolment := f.in("internal/identity", "internal/channel", "internal/session") && strings.Contains(path.Base(f.name), "enroll")
		rootByHash := f.in("pki") && path.Base(f.name) == "ra_root.go" // what is fetched there is compared with its SHA-256
		if enrolment || rootByHash {
			continue
		}
		for _, place := range f.identifiers("InsecureSkipVerify") {
			bad = append(bad, place+": InsecureSkipVerify belongs to the enrolment files of internal/{identity,channel,session}")
		}
	}
	return bad
}

// noSleep: code waits for a condition or for a timer beside a context; tests
// too, unless their clock is that of testing/synctest.
func noSleep(files []source) (bad []string) {
	for _, f := range files {
		if f.test() && slices.Contains(f.imports(), "testing/synctest") {
			continue
		}
		for _, place := range f.calls("time", "Sleep") {
			bad = append(bad, place+": time.Sleep: wait for a condition, or use testing/synctest")
		}
	}
	return bad
}

// rules are checked on the parsed files. Each has a file that breaks it.
var rules = []struct {
	name    string
	check   rule
	breaker map[string]string
}{
	{"roles never import roles", rolesApart, map[string]string{
		"node/a.go": "package node\n\nimport _ \"sallyport/gateway/store\"\n",
	}},
	{"not in tests either", rolesApart, map[string]string{
		"rcp/peers_test.go": "package rcp\n\nimport _ \"sallyport/node\"\n",
	}},
	{"imports point down", shared, map[string]string{
		"internal/session/a.go": "package session\n\nimport _ \"sallyport/rcp\"\n",
	}},
	{"only pki imports smallstep", only("pki", "github.com/smallstep", "go.step.sm"), map[string]string{
		"gateway/a.go": "package gateway\n\nimport _ \"github.com/smallstep/certificates/authority\"\n",
	}},
	{"only internal/channel imports http2", only("internal/channel", "golang.org/x/net/http2"), map[string]string{
		"rcp/a.go": "package rcp\n\nimport _ \"golang.org/x/net/http2\"\n",
	}},
	{"only internal/channel imports quic-go", only("internal/channel", "github.com/quic-go"), map[string]string{
		"internal/session/a.go": "package session\n\nimport _ \"github.com/quic-go/quic-go/http3\"\n",
	}},
	{"wire is a leaf", leaf("internal/wire"), map[string]string{
		"internal/wire/a.go": "package wire\n\nimport _ \"sallyport/internal/identity\"\n",
	}},
	{"config is a leaf", leaf("config"), map[string]string{
		"config/a.go": "package config\n\nimport _ \"sallyport/internal/wire\"\n",
	}},
	{"VerifyPeerCertificate is never used", verifyConnection, map[string]string{
		"internal/channel/a_test.go": "package channel\n\nimport \"crypto/tls\"\n\nvar c = tls.Config{VerifyPeerCertificate: nil}\n",
	}},
	{"InsecureSkipVerify only for enrolment", skipVerify, map[string]string{
		"internal/channel/dial.go": "package channel\n\nimport \"crypto/tls\"\n\nvar c = tls.Config{InsecureSkipVerify: true}\n",
	}},
	{"nobody sleeps", noSleep, map[string]string{
		"node/a_test.go": "package node\n\nimport \"time\"\n\nfunc f() { time.Sleep(time.Second) }\n",
	}},
	{"files are replaced in one place, which writes beside them", only("internal/atomicfile", "github.com/google/renameio/v2"), map[string]string{
		"node/save.go": "package node\n\nimport _ \"github.com/google/renameio/v2\"\n",
	}},
	{"nor by assignment, nor in a role's enrolment", skipVerify, map[string]string{
		"gateway/enroll.go": "package gateway\n\nimport \"crypto/tls\"\n\nfunc f(c *tls.Config) { c.InsecureSkipVerify = true }\n",
	}},
}

func TestRules(t *testing.T) {
	files := parse(t, repository(t))
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, line := range r.check(files) {
				t.Error(line)
			}
			if bad := r.check(parse(t, synthetic(t, r.breaker))); len(bad) != 1 {
				t.Errorf("the rule finds %d violations in a module with one: %q", len(bad), bad)
			}
		})
	}
}

// TestAllowed shows that the exceptions of the rules are not mistaken for violations.
func TestAllowed(t *testing.T) {
	files := parse(t, synthetic(t, map[string]string{
		"pki/a.go":                     "package pki\n\nimport _ \"github.com/smallstep/certificates/authority\"\n",
		"internal/channel/h2.go":       "package channel\n\nimport _ \"golang.org/x/net/http2\"\nimport _ \"github.com/quic-go/quic-go\"\n",
		"internal/session/enroll.go":   "package session\n\nimport \"crypto/tls\"\n\nvar c = tls.Config{InsecureSkipVerify: true}\n",
		"internal/channel/bad_test.go": "package channel\n\nimport \"crypto/tls\"\n\nvar c = tls.Config{InsecureSkipVerify: true}\n",
		"node/policy/a.go":             "package policy\n\nimport _ \"sallyport/internal/wire\"\n",
		"node/a.go":                    "package node\n\nimport _ \"sallyport/node/policy\"\n",
		"cmd/sallyport/main.go":        "package main\n\nimport _ \"sallyport/gateway\"\nimport _ \"sallyport/node\"\n",
		"gateway/a_test.go":            "package gateway\n\nimport (\n\t_ \"testing/synctest\"\n\t\"time\"\n)\n\nfunc f() { time.Sleep(time.Hour) }\n",
		"internal/atomicfile/a.go":     "package atomicfile\n\nimport _ \"github.com/google/renameio/v2\"\n",
		"config/a_test.go":             "package config_test\n\nimport _ \"sallyport/config\"\n",
	}))
	for _, r := range rules {
		for _, line := range r.check(files) {
			t.Errorf("%s: %s", r.name, line)
		}
	}
}

// heavy is what the exposed box and the monitored host never carry: other
// roles, database servers, the CA, the REST server.
func heavy(own string) []string {
	list := []string{
		"github.com/smallstep", "go.step.sm", "github.com/danielgtaylor/huma",
		"github.com/nats-io", "github.com/jackc/pgx", "github.com/go-sql-driver",
		"github.com/pressly/goose", "github.com/uptrace/bun", "modernc.org/sqlite",
		module + "/internal/sqldb",
	}
	for _, role := range roles {
		if role != own {
			list = append(list, module+"/"+role)
		}
	}
	return list
}

// linked returns one line per package that stands in the list.
func linked(packages, list []string) (bad []string) {
	for _, p := range packages {
		for _, h := range list {
			if within(p, h) {
				bad = append(bad, p)
			}
		}
	}
	return bad
}

func TestSlimPrograms(t *testing.T) {
	root := repository(t)
	for _, own := range []string{"rcp", "node"} {
		t.Run(own, func(t *testing.T) {
			for _, p := range linked(deps(t, root, "cmd/sallyport-"+own), heavy(own)) {
				t.Errorf("sallyport-%s links %s", own, p)
			}
		})
	}
}

// TestSlimProgramsControl: a slim program that drags the gateway's database,
// the CA and the REST server behind a package between is found.
func TestSlimProgramsControl(t *testing.T) {
	root := synthetic(t, map[string]string{
		"cmd/sallyport-rcp/main.go": "package main\n\nimport _ \"sallyport/internal/cli\"\n\nfunc main() {}\n",
		"internal/cli/cli.go":       "package cli\n\nimport _ \"sallyport/gateway/store\"\n",
		"gateway/store/store.go":    "package store\n\nimport (\n\t_ \"github.com/smallstep/certificates\"\n\t_ \"github.com/danielgtaylor/huma/v2\"\n)\n",
	}, "github.com/smallstep/certificates", "github.com/danielgtaylor/huma/v2")
	want := []string{"github.com/danielgtaylor/huma/v2", "github.com/smallstep/certificates", "sallyport/gateway/store"}
	got := linked(deps(t, root, "cmd/sallyport-rcp"), heavy("rcp"))
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}
