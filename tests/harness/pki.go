package harness

import (
	"os"
	"os/exec"
	"path/filepath"
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

// StepCA builds smallstep's own CA.
func (s *Site) StepCA() string {
	s.t.Helper()
	return s.smallstep("github.com/smallstep/certificates/cmd/step-ca")
}

// Step builds smallstep's command line.
func (s *Site) Step() string {
	s.t.Helper()
	return s.smallstep("github.com/smallstep/cli/cmd/step")
}

// smallstep builds a program of tests/stepca, a module of its own: the product
// carries none of what it needs. The tags are the same for all, so that what
// they share is compiled once. Without its modules in the cache or a network
// the test is skipped at the desk, and fails in CI.
func (s *Site) smallstep(path string) string {
	s.t.Helper()
	root, err := Repository()
	if err != nil {
		s.t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	name := filepath.Base(path)
	program := filepath.Join(cache, "sallyport-tests", name)
	cmd := exec.CommandContext(s.t.Context(), "go", "build", "-tags", "nobadger,nomysql,nopgx", "-o", program, path)
	cmd.Dir, cmd.Env = filepath.Join(root, "tests", "stepca"), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		if os.Getenv("CI") == "true" {
			s.t.Fatalf("build %s: %v\n%s", name, err, out)
		}
		s.t.Skipf("%s cannot be built here: %v\n%s", name, err, out)
	}
	return program
}
