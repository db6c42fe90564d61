package config

import (
	"fmt"
	"io"
	"os"
	"strings"
)

// Operator is the configuration of the commands that talk to a gateway.
type Operator struct {
	Common
	URL       URL    `env:"SALLYPORT_URL" doc:"the gateway's API" form:"https://host:port or unix:///path" why:"the socket under $SALLYPORT_DATA, then under /var/lib/sallyport"`
	TokenFile string `env:"SALLYPORT_TOKEN_FILE" doc:"file with the API token for https://" form:"a path" why:"none: who may open the socket needs no token; a token in a variable would leak into children"`
	CAFile    string `env:"SALLYPORT_CA_FILE" doc:"PEM file with the CA that signed the API's certificate" form:"a path" why:"the system's roots"`
}

// LoadOperator reads environ, as os.Environ returns it.
func LoadOperator(environ []string) (Operator, error) {
	var c Operator
	err := load(&c, environ)
	return c, err
}

func (c *Operator) common() *Common { return &c.Common }

func (c *Operator) validate() error {
	if strings.HasPrefix(string(c.URL), "https://") && c.TokenFile == "" {
		return wrong("SALLYPORT_TOKEN_FILE", "not set, and %s needs a token; make one with `sallyport token create` where the gateway runs", c.URL)
	}
	return nil
}

// maxToken bounds what is read as a token.
const maxToken = 4 << 10

// Token reads the API token. It is empty without a file.
func (c Operator) Token() (Secret, error) {
	if c.TokenFile == "" {
		return "", nil
	}
	f, err := os.Open(c.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read SALLYPORT_TOKEN_FILE: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("read SALLYPORT_TOKEN_FILE: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(token) > maxToken || strings.ContainsAny(token, " \t\r\n") {
		return "", wrong("SALLYPORT_TOKEN_FILE", "%s does not hold exactly one token", quote(c.TokenFile))
	}
	return Secret(token), nil
}
