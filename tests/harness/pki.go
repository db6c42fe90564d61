package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// PKI is a certificate authority in a process of its own.
type PKI struct {
	*Role

	Address string // host:port, or the path of its socket
}

// PKI starts a certificate authority, on the host "pki" of a lab, and waits
// until a code for a gateway can be had.
func (s *Site) PKI(opts ...Option) *PKI {
	s.t.Helper()
	p := &PKI{Role: s.prepare("pki", "pki", map[string]string{}, opts)}
	p.Address = p.opts.env["SALLYPORT_PKI_LISTEN"]
	if p.Address == "" {
		p.Address = filepath.Join(p.Data, "pki", "pki.sock")
	}
	p.start("pki")
	Eventually(s.t, startTimeout, "the authority is there", func() error { return p.Run("ca", "gateway", "list").Err() })
	Eventually(s.t, startTimeout, "the authority has its root", func() error { return p.Run("ca", "gateway", "add", "--ttl", "1s").Err() })
	return p
}

// Run runs the operator's command line on the authority's host.
func (p *PKI) Run(args ...string) Result {
	p.site.t.Helper()
	env := map[string]string{"SALLYPORT_DATA": p.Data}
	for _, name := range []string{"SALLYPORT_PKI_PASSPHRASE_FILE"} {
		if v, set := p.opts.env[name]; set {
			env[name] = v
		}
	}
	return runCommand(p.site.t, p.host, environment(env), "", p.site.Program("sallyport"), args...)
}

// Serves makes a gateway use this authority: its code is made now.
func (p *PKI) Serves() Option {
	p.site.t.Helper()
	file := p.site.File("gateway.code", p.Run("ca", "gateway", "add").Exits(0).Stdout)
	return func(o *options) {
		o.env["SALLYPORT_GATEWAY_PKI"] = p.Address
		o.env["SALLYPORT_GATEWAY_PKI_CODE_FILE"] = file
	}
}

// StepCA is smallstep's own CA.
func (s *Site) StepCA() string {
	s.t.Helper()
	return s.smallstep("step-ca")
}

// Step is smallstep's command line.
func (s *Site) Step() string {
	s.t.Helper()
	return s.smallstep("step")
}

// smallstep is one of smallstep's programs. Without their modules in the cache
// or a network the test is skipped at the desk, and fails in CI.
func (s *Site) smallstep(name string) string {
	s.t.Helper()
	dir, err := smallstepPrograms()
	if err != nil && os.Getenv("CI") == "true" {
		s.t.Fatal(err)
	}
	if err != nil {
		s.t.Skip(err)
	}
	return filepath.Join(dir, name)
}

// smallstepPrograms builds them, once per test process and in one go: by
// themselves, tests that run at the same time would each compile the hundreds of
// packages that they share.
var smallstepPrograms = sync.OnceValues(func() (string, error) { return buildSmallstep(context.Background()) })

// buildSmallstep makes the programs of tests/stepca, a module of its own: the
// product carries none of what they need.
func buildSmallstep(ctx context.Context) (string, error) {
	root, err := Repository()
	if err != nil {
		return "", err
	}
	dir, unlock, err := lockPrograms("smallstep")
	if err != nil {
		return "", err
	}
	defer unlock()
	cmd := exec.CommandContext(ctx, "go", "build", "-tags", "nobadger,nomysql,nopgx", "-o", dir+string(filepath.Separator),
		"github.com/smallstep/certificates/cmd/step-ca", "github.com/smallstep/cli/cmd/step")
	cmd.Dir, cmd.Env = filepath.Join(root, "tests", "stepca"), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build smallstep's programs: %w\n%s", err, out)
	}
	return dir, nil
}
