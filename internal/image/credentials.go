package image

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
)

// credentials are what a host says to registries, by their names.
type credentials map[string]credential

type credential struct{ user, secret string }

// readCredentials reads a file in the form of docker's config.json. Helpers,
// which are programs on a person's desk, are refused rather than run.
func readCredentials(file string) (credentials, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the registries' credentials: %w", err)
	}
	known, err := parseCredentials(text)
	if err != nil { // the host's mistake, whatever image was asked for
		return nil, fmt.Errorf("read %s: %v: %w", file, err, errdefs.ErrFailedPrecondition)
	}
	return known, nil
}

func parseCredentials(text []byte) (credentials, error) {
	var config struct {
		Auths map[string]struct {
			Auth          string `json:"auth"`
			Username      string `json:"username"`
			Password      string `json:"password"`
			IdentityToken string `json:"identitytoken"`
		} `json:"auths"`
		CredsStore  string            `json:"credsStore"`
		CredHelpers map[string]string `json:"credHelpers"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument) // the error names no value
	}
	if config.CredsStore != "" || len(config.CredHelpers) > 0 {
		return nil, fmt.Errorf("credsStore and credHelpers are not supported: auths must have the credentials: %w", errdefs.ErrInvalidArgument)
	}
	known := credentials{}
	for registry, a := range config.Auths {
		c := credential{a.Username, a.Password}
		if a.Auth != "" {
			b, err := base64.StdEncoding.DecodeString(a.Auth)
			user, password, ok := strings.Cut(string(b), ":")
			if err != nil || !ok {
				return nil, fmt.Errorf("auths.%s.auth is not the base64 of user:password: %w", registry, errdefs.ErrInvalidArgument)
			}
			c = credential{user, strings.TrimRight(password, "\x00")}
		}
		if a.IdentityToken != "" {
			c = credential{"", a.IdentityToken} // as containerd takes a refresh token
		}
		known[registryHost(registry)] = c
	}
	return known, nil
}

// registryHost is the host of a key as docker writes them: with a scheme, a
// path, or Docker Hub's old name.
func registryHost(key string) string {
	if _, rest, ok := strings.Cut(key, "://"); ok {
		key = rest
	}
	host, _, _ := strings.Cut(key, "/")
	switch host {
	case "index.docker.io", "docker.io":
		return "registry-1.docker.io"
	}
	return host
}

// of is what to say to a registry, as containerd asks for it.
func (c credentials) of(host string) (user, secret string, err error) {
	found := c[host]
	return found.user, found.secret, nil
}
