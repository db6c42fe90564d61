package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// caPassphraseCommand works on the files of this host: whoever may read and
// write them needs nobody's leave.
func (a *app) caPassphraseCommand() *cobra.Command {
	var none bool
	cmd := &cobra.Command{
		Use: "passphrase NEW-FILE", Short: "Change the passphrase of the CA's keys on this host", Args: cli.Between(0, 1),
		Long: "Encrypt the CA's keys in $SALLYPORT_DATA/pki under the passphrase in NEW-FILE. SALLYPORT_PKI_PASSPHRASE_FILE\n" +
			"names the file with the one in force. The process that holds the CA must not run. It can be repeated after it\n" +
			"was cut off. Copies of the keys in backups keep the passphrase that they have.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if none == (len(args) == 1) {
				return cli.Usage("name the file with the new passphrase, or say --none")
			}
			c, err := config.LoadPKI(a.streams.Env)
			if err != nil {
				return err
			}
			old, err := c.Passphrase()
			if err != nil {
				return err
			}
			var next []byte
			if !none {
				s, err := config.ReadPassphrase("NEW-FILE", args[0])
				if err != nil {
					return err
				}
				next = []byte(s.Reveal())
			}
			var current []byte
			if old != "" {
				current = []byte(old.Reveal())
			}
			if err := pki.Reseal(c.Dir("pki"), current, next); err != nil {
				return err
			}
			if none {
				a.out.Note("The keys lie open in %s now. Start without SALLYPORT_PKI_PASSPHRASE_FILE, or they are encrypted again.", c.Dir("pki"))
				return nil
			}
			file, err := filepath.Abs(args[0]) // a service starts in another directory
			if err != nil {
				return err
			}
			a.out.Note("Set SALLYPORT_PKI_PASSPHRASE_FILE=%s before the next start.", file)
			return nil
		},
	}
	cmd.Flags().BoolVar(&none, "none", false, "leave the keys unencrypted")
	return cmd
}

// maxChainFile bounds what is read as certificates.
const maxChainFile = 256 << 10

func readChain(file string) ([]*x509.Certificate, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxChainFile))
	if err != nil {
		return nil, err
	}
	chain, err := pki.ParseChain(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return chain, nil
}

// caCSRCommand works on the files of this host.
func (a *app) caCSRCommand() *cobra.Command {
	var rootFile, trustDomain string
	var doors bool
	cmd := &cobra.Command{
		Use: "csr [--root FILE] [--trust-domain NAME] [--doors]", Short: "Print a request for an intermediate that a root kept elsewhere signs", Args: cli.Exactly(0),
		Long: "Make a key for the next SPIFFE intermediate in $SALLYPORT_DATA/pki (or in the signer of SALLYPORT_PKI_SIGNER) and\n" +
			"print the request (PKCS #10, PEM) alone on stdout. Before the first start, --root names the root's certificate, from\n" +
			"which the trust domain is made, or --trust-domain the trust domain itself. The same request can be had again.\n" +
			"With --doors it is for the intermediate of the doors, which certify other programs.",
		RunE: func(*cobra.Command, []string) error {
			c, err := config.LoadPKI(a.streams.Env)
			if err != nil {
				return err
			}
			opts, err := keyOptions(c)
			if err != nil {
				return err
			}
			if doors {
				if rootFile != "" || trustDomain != "" {
					return cli.Usage("--doors takes neither --root nor --trust-domain: any root may sign it, and the CA here has its trust domain")
				}
				return a.doorsCSR(c, opts)
			}
			var root *x509.Certificate
			if rootFile != "" {
				chain, err := readChain(rootFile)
				if err != nil {
					return err
				}
				root = chain[len(chain)-1]
			}
			csr, td, err := pki.RequestIntermediate(c.Dir("pki"), root, trustDomain, opts...)
			if err != nil {
				return err
			}
			a.out.Note("# for spiffe://%s. Sign it as a CA, with all that it asks for, and for years; with openssl:", td)
			a.out.Note("#   openssl x509 -req -in FILE -CA root.pem -CAkey root.key -days 1825 -copy_extensions copyall -out intermediate.pem")
			a.out.Note("# Then, while no process holds the CA: cat intermediate.pem root.pem > chain.pem; sallyport ca import chain.pem")
			return a.out.Raw(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))
		},
	}
	cmd.Flags().BoolVar(&doors, "doors", false, "for the intermediate of the doors")
	cmd.Flags().StringVar(&rootFile, "root", "", "PEM file of the root that will sign it")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "the trust domain of a new CA (default: made from the root's key)")
	return cmd
}

// doorsCSR is csr --doors.
func (a *app) doorsCSR(c config.PKI, opts []pki.Option) error {
	csr, td, err := pki.RequestDoors(c.Dir("pki"), opts...)
	if err != nil {
		return err
	}
	a.out.Note("# for certificates of other programs, never of %s. Sign it as a CA, with all that it asks for, and for years; with openssl:", td)
	a.out.Note("#   openssl x509 -req -in FILE -CA root.pem -CAkey root.key -days 1825 -copy_extensions copyall -out doors.pem")
	a.out.Note("# Then, while no process holds the CA: cat doors.pem root.pem > chain.pem; sallyport ca import --doors chain.pem")
	return a.out.Raw(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))
}

// doorsImported is what `ca import --doors` prints.
type doorsImported struct {
	Intermediate string `json:"intermediate"`
	Root         string `json:"root"`
	NotAfter     string `json:"not_after"`
}

func (a *app) importDoors(ctx context.Context, c config.PKI, chain []*x509.Certificate) error {
	ca, err := caOptions(c)
	if err != nil {
		return err
	}
	if err := pki.ImportDoors(ctx, c.Dir("pki"), chain, slog.New(slog.DiscardHandler), ca...); err != nil {
		return err
	}
	r := doorsImported{wire.KeyOf(chain[0]).Fingerprint(), wire.KeyOf(chain[len(chain)-1]).Fingerprint(), cli.Time(chain[0].NotAfter)}
	return a.out.Print(r, cli.Table{Columns: []string{"intermediate", "root", "not_after"}, Rows: [][]string{{r.Intermediate, r.Root, r.NotAfter}}})
}

// imported is what `ca import` prints.
type imported struct {
	TrustDomain  string `json:"trust_domain"`
	Intermediate string `json:"intermediate"`
	Root         string `json:"root"`
	NotAfter     string `json:"not_after"`
	Rollover     bool   `json:"rollover"` // one is under way now
}

func (a *app) caImportCommand() *cobra.Command {
	var doors bool
	cmd := &cobra.Command{
		Use: "import [--doors] CHAIN", Short: "Take the certificate that was made of ca csr, and the root above it", Args: cli.Exactly(1),
		Long: "Take the certificate that was made of the request of ca csr, and the root that signed it, from one PEM file. A\n" +
			"directory without a CA gets one, whose root key never was on this host. In one that has a CA the imported\n" +
			"intermediate issues from now on, and a rollover is under way. The process that holds the CA must not run.\n" +
			"With --doors it is the intermediate of the doors, and no rollover: the file may hold more between it and its root.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.LoadPKI(a.streams.Env)
			if err != nil {
				return err
			}
			opts, err := keyOptions(c)
			if err != nil {
				return err
			}
			chain, err := readChain(args[0])
			if err != nil {
				return err
			}
			if doors {
				return a.importDoors(cmd.Context(), c, chain)
			}
			state, err := pki.Import(cmd.Context(), c.Dir("pki"), chain, slog.New(slog.DiscardHandler), opts...)
			if err != nil {
				return err
			}
			i := state.Issuing()
			r := imported{TrustDomain: state.TrustDomain, Intermediate: i.Key.Fingerprint(), Root: state.RootOf(i.Key).Key.Fingerprint(), NotAfter: cli.Time(i.NotAfter), Rollover: state.Rollover != nil}
			if !pki.Constrained(chain[0]) {
				a.out.Note("The intermediate has no name constraints: its key can make certificates of your root for any name, not for %s only.", r.TrustDomain)
			}
			if r.Rollover {
				a.out.Note("A rollover is under way: the parties are renewed from the new intermediate when the gateway runs.")
			}
			return a.out.Print(r, cli.Table{Columns: []string{"trust_domain", "intermediate", "root", "not_after"},
				Rows: [][]string{{r.TrustDomain, r.Intermediate, r.Root, r.NotAfter}}})
		},
	}
	cmd.Flags().BoolVar(&doors, "doors", false, "it is the intermediate of the doors")
	return cmd
}
