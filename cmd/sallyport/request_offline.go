package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/sealed"
	"sallyport/internal/wire"
)

func (a *app) requestImportCommand() *cobra.Command {
	return &cobra.Command{Use: "import FILE|-", Short: "Queue the certificate request in a file from a host that cannot reach an RCP", Args: cli.Exactly(1),
		Long: "Queue the request that `sallyport local csr` wrote on a node or an RCP. It waits like any other: compare the\n" +
			"fingerprint, then `request grant` or `request deny`. The same file imported twice is one request.",
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := a.readFile(args[0], wire.MaxOfflineRequest)
			if err != nil {
				return err
			}
			r, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.Request, error) {
				return c.ImportRequest(ctx, api.ImportRequest{File: text})
			})
			if err != nil {
				return fmt.Errorf("import %s: %w", args[0], err)
			}
			if err := a.out.Print(r, requestTable(r)); err != nil {
				return err
			}
			if r.State == api.RequestGranted {
				a.out.Note("A rule granted it (%s): `sallyport request export %s FILE`.", r.Rule, r.ID)
			} else {
				a.out.Note("Compare the fingerprint with the one on the host, then: sallyport request grant %s && sallyport request export %s FILE", r.ID, r.ID)
			}
			return nil
		}}
}

func (a *app) requestExportCommand() *cobra.Command {
	granted := func(ctx context.Context, c *api.Client) ([]string, error) {
		var names []string
		for _, state := range []string{api.RequestGranted, api.RequestDelivered} {
			all, err := c.Requests(ctx, api.RequestQuery{State: state})
			if err != nil {
				return nil, err
			}
			for _, r := range all {
				names = append(names, r.ID)
			}
		}
		return names, nil
	}
	return &cobra.Command{Use: "export ID|NAME [FILE]", Short: "Issue the certificate of a granted request, into a file for its host", Args: cli.Between(1, 2), ValidArgsFunction: a.completeNames(1, granted),
		Long: "Write what a party is given when it is granted into a new file, or to standard output: its certificate chain, the\n" +
			"trust document, the revocation set and the addresses of the RCPs. Nothing in it is secret. `sallyport local\n" +
			"certificate import FILE` installs it on the host. The request is delivered with that; a lost file can be written again.",
		RunE: func(cmd *cobra.Command, args []string) error {
			// A certificate that finds no file is issued in vain: the file comes first.
			var file *cli.ReservedFile
			if len(args) == 2 && args[1] != "-" {
				var err error
				if file, err = cli.ReserveFile(args[1], 0o644); err != nil {
					return err
				}
			}
			out, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.ExportedRequest, error) {
				return c.ExportRequest(ctx, args[0])
			})
			if err != nil {
				err = fmt.Errorf("export %s: %w", args[0], err)
				if file != nil {
					err = errors.Join(err, file.Remove())
				}
				return err
			}
			if len(out.Ways) == 0 {
				a.out.Note("No RCP has a public address yet: the host needs SALLYPORT_%s_UPSTREAMS, or another export after `sallyport rcp add`.", strings.ToUpper(string(out.Request.Role)))
			}
			if file == nil {
				return a.out.Raw([]byte(out.File))
			}
			if err := file.Fill([]byte(out.File)); err != nil {
				return err
			}
			return a.out.Print(out.Request, requestTable(out.Request))
		}}
}

// readFile reads a file, or standard input, of at most limit bytes.
func (a *app) readFile(name string, limit int) (string, error) {
	in := a.streams.In
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, int64(limit)+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > limit {
		return "", fmt.Errorf("read %s: %w (%d bytes)", name, wire.ErrTooLarge, limit)
	}
	return string(b), nil
}

// bundling makes a whole identity for a host that cannot make a key. The key
// is made by this command and leaves it in the encrypted file alone: neither
// the gateway's API nor its database ever has it.
type bundling struct {
	a          *app
	role       string
	passphrase string
	replace    bool
	tags       []string
}

func (a *app) requestBundleCommand() *cobra.Command {
	b := &bundling{a: a}
	cmd := &cobra.Command{Use: "bundle NAME FILE --passphrase-file FILE", Short: "Make key and certificate for a host that cannot make a key, in an encrypted file", Args: cli.Exactly(2),
		Long: "Make a key and a UUID here, have the certificate granted and issued, and write all of it into a new file, encrypted\n" +
			"under a passphrase. On the host `sallyport local certificate import FILE --passphrase-file FILE` installs it. Who has\n" +
			"file and passphrase is that party: bring them by different ways, and delete the file afterwards. Where the host can\n" +
			"run `sallyport local csr`, its key need never leave it: prefer that.",
		RunE: func(cmd *cobra.Command, args []string) error { return b.run(cmd.Context(), args[0], args[1]) }}
	f := cmd.Flags()
	f.StringVar(&b.role, "role", string(wire.RoleNode), "node, or rcp for one that sallyport rcp add made")
	f.StringVar(&b.passphrase, "passphrase-file", "", "file whose one line is the passphrase")
	f.BoolVar(&b.replace, "replace", false, "revoke a live node of that name, and keep its tags and history")
	f.StringArrayVar(&b.tags, "tag", nil, "tag that the node gets, k=v, as node tag sets it; may be given several times")
	_ = cmd.RegisterFlagCompletionFunc("role", fixed(string(wire.RoleNode), string(wire.RoleRCP)))
	return cmd
}

func (b *bundling) run(ctx context.Context, name, file string) error {
	role := wire.Role(b.role)
	if role != wire.RoleNode && role != wire.RoleRCP {
		return cli.Usage("--role %q: want node or rcp", b.role)
	}
	tags, err := parseTags(b.tags)
	if err != nil {
		return err
	}
	if len(tags) > 0 && role != wire.RoleNode {
		return cli.Usage("--tag: an RCP has no tags")
	}
	if b.passphrase == "" {
		return cli.Usage("--passphrase-file: name the file that holds the passphrase for the bundle")
	}
	passphrase, err := cli.Passphrase(b.a.streams, b.passphrase, "--passphrase-file", true)
	if err != nil {
		return err
	}
	if file == "-" {
		return cli.Usage("bundle %s -: name a new file: a bundle that reached nobody is lost with its key", name)
	}
	// A key that finds no file is lost, and the node that has it is in the way
	// of the next try: the file comes first.
	out, err := cli.ReserveFile(file, 0o600)
	if err != nil {
		return err
	}
	r, bundle, err := b.make(ctx, role, name, tags, passphrase)
	if err != nil {
		return errors.Join(err, out.Remove())
	}
	if err := out.Fill(bundle); err != nil {
		return err
	}
	return b.a.out.Print(r, requestTable(r))
}

// make has a new identity certified, and returns it encrypted.
func (b *bundling) make(ctx context.Context, role wire.Role, name string, tags map[string]string, passphrase []byte) (r api.Request, file []byte, err error) {
	c, err := b.a.client()
	if err != nil {
		return r, nil, err
	}
	defer c.Close()
	pin, err := c.Pin(ctx)
	if err != nil {
		return r, nil, err
	}
	files := memory{}
	id, err := identity.OpenStore(files, role)
	if err != nil {
		return r, nil, err
	}
	key, err := files.key()
	if err != nil {
		return r, nil, err
	}
	root, err := wire.ParseFingerprint(pin.Root)
	if err != nil {
		return r, nil, err
	}
	bundle := wire.OfflineBundle{Type: wire.TypeOfflineBundle, Role: role, ID: id.ID(), TrustDomain: pin.TrustDomain, Root: root, Key: key}
	if err := id.Pin(bundle.Root, bundle.TrustDomain); err != nil {
		return r, nil, err
	}
	var answer wire.Envelope
	r, answer, err = b.issue(ctx, c, id, name, tags)
	if err != nil {
		return r, nil, err
	}
	bundle.Answer = answer
	if _, err := id.OpenAnswer(answer); err != nil {
		return r, nil, fmt.Errorf("the gateway's answer: %w", err)
	}
	var out bytes.Buffer
	w, err := sealed.NewWriter(&out, passphrase, sealed.Cost)
	if err != nil {
		return r, nil, err
	}
	if err := errors.Join(json.NewEncoder(w).Encode(bundle), w.Close()); err != nil {
		return r, nil, err
	}
	return r, out.Bytes(), nil
}

// issue has the request of id granted and answered. When that fails, no request
// is left behind.
func (b *bundling) issue(ctx context.Context, c *api.Client, id *identity.Identity, name string, tags map[string]string) (r api.Request, answer wire.Envelope, err error) {
	env, err := enroll.Offline(id, enroll.Offer{Name: name, Program: cli.BuildVersion()})
	if err != nil {
		return r, answer, err
	}
	text, err := wire.AppendOffline(nil, wire.PEMOfflineRequest, env)
	if err != nil {
		return r, answer, err
	}
	if r, err = c.ImportRequest(ctx, api.ImportRequest{File: string(text)}); err != nil {
		return r, answer, fmt.Errorf("bundle for %s: %w", name, err)
	}
	if _, err := c.GrantRequest(ctx, r.ID, api.Grant{Fingerprint: id.Fingerprint(), Replace: b.replace, Tags: tags}); err != nil {
		_, forgotten := c.DiscardRequest(context.WithoutCancel(ctx), r.ID)
		return r, answer, errors.Join(fmt.Errorf("bundle for %s: %w", name, err), forgotten)
	}
	out, err := c.ExportRequest(ctx, r.ID)
	if err != nil {
		return r, answer, fmt.Errorf("bundle for %s: it was granted, but its certificate was not issued and its key is not kept: run this again with --replace when the cause is mended: %w", name, err)
	}
	answer, err = wire.ParseOffline([]byte(out.File), wire.PEMOfflineAnswer, wire.MaxOfflineAnswer)
	return out.Request, answer, err
}

// memory keeps the files of an identity that is on its way elsewhere.
type memory map[string][]byte

// key is the private key that the identity made of itself, PKCS #8 in DER.
func (m memory) key() ([]byte, error) {
	for _, b := range m {
		if block, _ := pem.Decode(b); block != nil && block.Type == "PRIVATE KEY" {
			return block.Bytes, nil
		}
	}
	return nil, errors.New("the new identity has no key")
}

func (m memory) Read(name string) ([]byte, error) { return m[name], nil }

func (m memory) Write(name string, data []byte, _ os.FileMode) error {
	m[name] = slices.Clone(data)
	return nil
}

func (m memory) Remove(name string) error {
	delete(m, name)
	return nil
}

func (m memory) Rename(from, to string) error {
	m[to] = m[from]
	delete(m, from)
	return nil
}
