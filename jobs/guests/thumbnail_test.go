//go:build linux

package guests

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// secret is in every place of a picture where a text can be.
const secret = "SECRET-4711"

// scene is a picture with something different in each corner, edges and soft colours.
func scene(r *rand.Rand, w, h int) image.Image {
	m := image.NewNRGBA(image.Rect(0, 0, w, h))
	a, b := 2+r.IntN(40), 2+r.IntN(40)
	for y := range h {
		for x := range w {
			light := (x/a + y/b) % 2 * 90 // an edge of colours alone would not survive any JPEG
			c := color.NRGBA{uint8(light + 160*x/w), uint8(light + 160*y/h), uint8(light + 80), 255}
			if x < w/4 && y < h/6 {
				c = color.NRGBA{250, 30, 20, 255}
			}
			m.SetNRGBA(x, y, c)
		}
	}
	return m
}

// imagemagick runs convert over a picture; its arguments stand between in and out.
func imagemagick(t *testing.T, in []byte, to string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(testenv.Tool(t, "convert", "imagemagick"), append(append([]string{"-"}, args...), to)...)
	cmd.Stdin = bytes.NewReader(in)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("convert %q: %v %s", args, err, &stderr)
	}
	return out
}

// tagged is a picture with all that exiftool can write into it, and something after
// its end.
func tagged(t *testing.T, picture []byte, orientation int) []byte {
	t.Helper()
	dir := t.TempDir()
	path, preview := filepath.Join(dir, "picture"), filepath.Join(dir, "preview.jpg")
	var b bytes.Buffer
	if err := jpeg.Encode(&b, image.NewGray(image.Rect(0, 0, 8, 8)), nil); err != nil {
		t.Fatal(err)
	}
	for p, data := range map[string][]byte{path: picture, preview: b.Bytes()} {
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"-q", "-overwrite_original", "-Make=" + secret, "-SerialNumber=" + secret, "-Artist=" + secret, "-UserComment=" + secret,
		"-GPSLatitude=50.9", "-GPSLatitudeRef=N", "-GPSLongitude=6.9", "-GPSLongitudeRef=E", "-DateTimeOriginal=2024:05:06 07:08:09",
		"-XMP:Creator=" + secret, "-XMP:Location=" + secret, "-Comment=" + secret, fmt.Sprintf("-Orientation#=%d", orientation)}
	if bytes.HasPrefix(picture, []byte("\xff\xd8")) {
		args = append(args, "-IPTC:By-line="+secret, "-ThumbnailImage<="+preview)
	} else {
		args = append(args, "-PNG:Author="+secret)
	}
	if text, err := exec.Command(testenv.Tool(t, "exiftool", "libimage-exiftool-perl"), append(args, path)...).CombinedOutput(); err != nil {
		t.Fatalf("exiftool: %v %s", err, text)
	}
	out, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(out, []byte(secret)) {
		t.Fatal("exiftool has written nothing")
	}
	return append(out, "after the end "+secret...)
}

// tells is what exiftool finds in a picture beside what any has: group and tag.
func tells(t *testing.T, picture []byte) (found []string) {
	t.Helper()
	cmd := exec.Command(testenv.Tool(t, "exiftool", "libimage-exiftool-perl"), "-j", "-G1", "-a", "-u", "-U", "-")
	cmd.Stdin = bytes.NewReader(picture)
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("exiftool: %v", err)
	}
	var all []map[string]any
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	for tag := range all[0] {
		group, _, _ := strings.Cut(tag, ":")
		switch group {
		case "SourceFile", "File", "System", "ExifTool", "Composite", "JFIF", "Adobe", "ICC-header", "ICC_Profile":
			if tag == "File:Comment" || tag == "ExifTool:Warning" || tag == "File:ExifByteOrder" && len(found) > 0 {
				found = append(found, tag)
			}
		case "PNG", "PNG-pHYs", "PNG-cICP":
			if !slices.Contains([]string{"ImageWidth", "ImageHeight", "BitDepth", "ColorType", "Compression", "Filter", "Interlace", "Gamma",
				"WhitePointX", "WhitePointY", "RedX", "RedY", "GreenX", "GreenY", "BlueX", "BlueY", "BackgroundColor", "SRGBRendering", "ProfileName",
				"Palette", "Transparency", "PixelsPerUnitX", "PixelsPerUnitY", "PixelUnits", "SignificantBits"}, strings.TrimPrefix(strings.TrimPrefix(tag, "PNG:"), "PNG-pHYs:")) {
				found = append(found, tag)
			}
		default:
			found = append(found, tag)
		}
	}
	slices.Sort(found)
	return found
}

// orients names each orientation as ImageMagick does, which does not look for it in
// a PNG's Exif.
var orients = []string{"", "TopLeft", "TopRight", "BottomRight", "BottomLeft", "LeftTop", "RightTop", "RightBottom", "LeftBottom"}

// pictures are of each kind that cameras and programs make, with all that they tell,
// turned in every way.
func pictures(t *testing.T) (all map[string][]byte, turned map[string]string) {
	t.Helper()
	r := rand.New(rand.NewPCG(testenv.Seed(t), 7))
	var p bytes.Buffer
	if err := png.Encode(&p, scene(r, 300+r.IntN(100), 200+r.IntN(50))); err != nil {
		t.Fatal(err)
	}
	plain := p.Bytes()
	soft := imagemagick(t, plain, "png:-", "-blur", "0x3")
	all, turned = map[string][]byte{
		"baseline 4:2:0":    imagemagick(t, soft, "jpg:-", "-quality", "92", "-sampling-factor", "2x2"),
		"progressive 4:4:4": imagemagick(t, soft, "jpg:-", "-quality", "95", "-sampling-factor", "1x1", "-interlace", "JPEG"),
		"restarts":          imagemagick(t, soft, "jpg:-", "-quality", "90", "-define", "jpeg:restart-interval=4"),
		"gray JPEG":         imagemagick(t, soft, "jpg:-", "-colorspace", "Gray", "-quality", "92"),
		"PNG":               plain,
		"16 bits PNG":       imagemagick(t, soft, "png48:-", "-depth", "16"),
		"gray PNG":          imagemagick(t, soft, "png:-", "-colorspace", "Gray"),
		"palette PNG":       imagemagick(t, plain, "png8:-", "-colors", "64"),
		"clear PNG":         imagemagick(t, plain, "png32:-", "-transparent", "rgb(250,30,20)"),
		"tall":              imagemagick(t, soft, "jpg:-", "-crop", "40x400+0+0", "+repage"),
		"tiny":              imagemagick(t, soft, "png:-", "-resize", "3x2!"),
	}, map[string]string{}
	at := r.IntN(8)
	for _, what := range slices.Sorted(maps.Keys(all)) {
		picture := all[what]
		at = at%8 + 1
		all[what], turned[what] = tagged(t, picture, at), orients[at]
	}
	return all, turned
}

func TestStripLeavesThePictureAndNothingOfItsMaker(t *testing.T) {
	all, _ := pictures(t)
	for what, in := range all {
		if len(tells(t, in)) < 5 {
			t.Fatalf("%s: exiftool finds only %q to begin with", what, tells(t, in))
		}
		out := run(t, "thumbnail", in, "-strip")
		if bytes.Contains(out, []byte(secret)) {
			t.Errorf("%s: the secret is still in it", what)
		}
		for _, tag := range tells(t, out) {
			// Of Exif, the orientation, and what exiftool says of any Exif.
			if !slices.Contains([]string{"IFD0:Orientation", "File:ExifByteOrder"}, tag) {
				t.Errorf("%s: exiftool still finds %s", what, tag)
			}
		}
		for _, args := range [][]string{nil, {"-auto-orient"}} {
			if !bytes.Equal(imagemagick(t, in, "rgba:-", args...), imagemagick(t, out, "rgba:-", args...)) {
				t.Errorf("%s: ImageMagick shows other pixels %q", what, args)
			}
		}
		if again := run(t, "thumbnail", out, "-strip"); !bytes.Equal(again, out) {
			t.Errorf("%s: a second time changes it", what)
		}
	}
}

// TestThumbnailsAreWhatImageMagickMakes compares pixel by pixel.
func TestThumbnailsAreWhatImageMagickMakes(t *testing.T) {
	all, turned := pictures(t)
	for i, what := range slices.Sorted(maps.Keys(all)) {
		in := all[what]
		size := []int{100, 33}[i%2]
		out := run(t, "thumbnail", in, "-size", fmt.Sprint(size), "-quality", "95")
		if told := tells(t, out); bytes.Contains(out, []byte(secret)) || len(told) > 0 {
			t.Errorf("%s: exiftool finds %q", what, told)
		}
		m, format, err := image.Decode(bytes.NewReader(out))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if isJPEG := bytes.HasPrefix(in, []byte("\xff\xd8")); isJPEG != (format == "jpeg") {
			t.Errorf("%s: it is now %s", what, format)
		}
		w, h := m.Bounds().Dx(), m.Bounds().Dy()
		// The size is ours to the pixel, hence the exclamation mark.
		native := imagemagick(t, in, "rgba:-", "-orient", turned[what], "-auto-orient", "-filter", "Catrom", "-resize", fmt.Sprintf("%dx%d!", w, h), "-depth", "8")
		ours := imagemagick(t, out, "rgba:-", "-depth", "8")
		if len(native) != len(ours) {
			t.Fatalf("%s: %d×%d is not what it has", what, w, h)
		}
		if large := max(w, h); large != size && what != "tiny" || what == "tiny" && large != 3 {
			t.Errorf("%s: a thumbnail of %d has %d×%d pixels", what, size, w, h)
		}
		sum, worst := 0, 0
		for i := range ours {
			d := int(ours[i]) - int(native[i])
			if i%4 != 3 && (ours[i|3] < 128 || native[i|3] < 128) {
				d = 0 // a colour that nobody sees
			}
			sum, worst = sum+max(d, -d), max(worst, d, -d)
		}
		mean, limit, most := float64(sum)/float64(len(ours)), 0.75, 12
		if format == "jpeg" {
			limit, most = 4, 110 // our encoder's loss, and the upsampling of colours
		}
		if mean > limit || worst > most {
			t.Errorf("%s to %d: %.2f away from ImageMagick's on average, %d at most", what, size, mean, worst)
		}
	}
}

// TestAColourProfileStays: without it the colours of most phones' pictures are wrong.
func TestAColourProfileStays(t *testing.T) {
	var b bytes.Buffer
	if err := jpeg.Encode(&b, scene(rand.New(rand.NewPCG(testenv.Seed(t), 8)), 300, 200), nil); err != nil {
		t.Fatal(err)
	}
	profile := make([]byte, 70_000) // two segments
	copy(profile[12:], "mntrRGB XYZ ")
	picture := slices.Clone(b.Bytes()[:2])
	for i, part := range [][]byte{profile[:65_000], profile[65_000:]} {
		picture = append(picture, 0xff, 0xe2)
		picture = binary.BigEndian.AppendUint16(picture, uint16(2+12+2+len(part)))
		picture = append(append(picture, "ICC_PROFILE\x00"...), byte(i+1), 2)
		picture = append(picture, part...)
	}
	want := bytes.Clone(picture[2:])
	picture = append(picture, b.Bytes()[2:]...)
	for _, args := range [][]string{{"-strip"}, {"-size", "50"}} {
		if out := run(t, "thumbnail", picture, args...); !bytes.Contains(out, want) {
			t.Errorf("%q: the profile is gone", args)
		}
	}
	gray := bytes.Replace(picture, []byte("mntrRGB "), []byte("mntrGRAY"), 1)
	if out := run(t, "thumbnail", gray, "-size", "50"); bytes.Contains(out, []byte("ICC_PROFILE")) {
		t.Error("a profile for gray is in a picture with colours")
	}
}

func TestThumbnailRefusesWhatItCannotDo(t *testing.T) {
	no := func(says string, in []byte, args ...string) {
		t.Helper()
		refuses(t, says, "thumbnail", in, args...)
		if len(args) == 0 {
			refuses(t, says, "thumbnail", in, "-strip")
		}
	}
	r := rand.New(rand.NewPCG(testenv.Seed(t), 9))
	var j, p bytes.Buffer
	if err := jpeg.Encode(&j, scene(r, 64, 48), nil); err != nil {
		t.Fatal(err)
	}
	if err := png.Encode(&p, scene(r, 64, 48)); err != nil {
		t.Fatal(err)
	}
	whole, pic := j.Bytes(), p.Bytes()
	no("is empty", nil)
	no("neither JPEG nor PNG", []byte("GIF89a"))
	no("neither JPEG nor PNG", inputs(t)["noise"])
	for _, at := range []int{2, 3, 20, 200, len(whole) / 2, len(whole) - 2, len(whole) - 1} {
		no("is cut off", whole[:at])
	}
	for _, at := range []int{8, 20, 33, 60, len(pic) / 2, len(pic) - 1} {
		no("is cut off", pic[:at])
	}
	damaged := slices.Clone(pic)
	damaged[len(pic)/2] ^= 1
	no("checksum", damaged)
	no("at byte 2 no marker begins", slices.Concat(whole[:2], []byte{0}, whole[2:]))
	no("has no picture", []byte("\xff\xd8\xff\xd9"))
	no("nobody knows what its marker 02", []byte("\xff\xd8\xff\x02\x00\x02\xff\xd9"))

	// A few bytes that claim to be 4 gigapixels.
	bomb := slices.Clone(whole)
	frame := bytes.Index(bomb, []byte{0xff, 0xc0})
	copy(bomb[frame+5:], "\xff\xff\xff\xff")
	no("65535 × 65535 pixels, more than the 50000000", bomb, "-size", "10")
	bomb = slices.Clone(pic)
	binary.BigEndian.PutUint32(bomb[16:], 100_000)
	binary.BigEndian.PutUint32(bomb[20:], 100_000)
	binary.BigEndian.PutUint32(bomb[29:], crc32.ChecksumIEEE(bomb[12:29]))
	no("100000 × 100000 pixels, more than", bomb, "-size", "10")
	no("64 × 48 pixels, more than the 3071 of -max-pixels", whole, "-max-pixels", "3071")
	// Pixels that are not all there, in a file that is.
	short := imagemagick(t, pic, "png:-", "-crop", "64x20+0+0", "+repage")
	binary.BigEndian.PutUint32(short[20:], 48)
	binary.BigEndian.PutUint32(short[29:], crc32.ChecksumIEEE(short[12:29]))
	no("cannot be read", short, "-size", "10")

	no("-size 0 is not between", whole, "-size", "0")
	no("-quality 101 is not between", whole, "-quality", "101")
	no("argument too many", whole, "picture.jpg")
}
