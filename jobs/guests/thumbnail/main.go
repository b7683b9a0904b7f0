// Command thumbnail is a guest that makes a picture small, or takes out of it what it
// tells of its maker, for JPEG and PNG:
//
//	thumbnail [-size 256] [-quality 85] [-max-pixels 50000000] [-in NAME] [-out NAME]
//	thumbnail -strip [-in NAME] [-out NAME]
//
// The first makes a picture of the same format that fits a square of -size pixels, never
// larger than it was, turned as its camera says (the orientation of Exif). Of all else that
// stood beside the pixels only the colour profile is kept, where it fits. A picture of more
// than -max-pixels is refused before it is unpacked: a few kilobytes can claim gigabytes.
//
// The second copies a picture without unpacking it, so that no pixel changes, and leaves out
// Exif with place, time, camera and preview, XMP, IPTC, comments, maker's notes, further
// pictures and whatever stands after its end. What is needed to show the same picture stays:
// colour profile, resolution, transparency, animation, and the orientation if it is not
// the usual one, alone in an Exif of its own.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"io"
	"os"

	"golang.org/x/image/draw"

	"github.com/deimos-edge/deimos/jobs/guests/deimos"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "thumbnail:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("thumbnail", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	in := flags.String("in", "", "")
	out := flags.String("out", "", "")
	size := flags.Int("size", 256, "")
	quality := flags.Int("quality", 85, "")
	most := flags.Int64("max-pixels", 50_000_000, "")
	strip := flags.Bool("strip", false, "")
	switch err := flags.Parse(args); {
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("%q is one argument too many; an input is named by -in", flags.Arg(0))
	case *size < 1 || *size > 8192:
		return fmt.Errorf("-size %d is not between 1 and 8192", *size)
	case *quality < 1 || *quality > 100:
		return fmt.Errorf("-quality %d is not between 1 and 100", *quality)
	}
	r, err := deimos.In(*in)
	if err != nil {
		return err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("cannot read the input: %w", err)
	}
	p, err := parse(data)
	if err != nil {
		return err
	}
	result := p.stripped()
	if !*strip {
		if result, err = thumbnail(data, p, *size, *quality, *most); err != nil {
			return err
		}
	}
	w, err := deimos.Out(*out)
	if err != nil {
		return err
	}
	_, err = w.Write(result)
	if err := errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("cannot write the output: %w", err)
	}
	return nil
}

// picture is a file, taken apart but not unpacked.
type picture interface {
	stripped() []byte
	orientation() int // 1 to 8, as Exif has it
	// dressed gives a picture that was made anew, gray or not, the colours of this one.
	dressed(made []byte, gray bool) []byte
	encode(w io.Writer, m image.Image, quality int) error
}

func parse(data []byte) (picture, error) {
	switch {
	case bytes.HasPrefix(data, []byte("\xff\xd8")):
		return parseJPEG(data)
	case bytes.HasPrefix(data, []byte(pngSignature)):
		return parsePNG(data)
	case len(data) == 0:
		return nil, errors.New("the input is empty")
	default:
		return nil, errors.New("the input is neither JPEG nor PNG")
	}
}

func thumbnail(data []byte, p picture, size, quality int, most int64) ([]byte, error) {
	config, _, err := image.DecodeConfig(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("the picture cannot be read: %w", err)
	}
	if n := int64(config.Width) * int64(config.Height); n > most {
		return nil, fmt.Errorf("the picture says that it has %d × %d pixels, more than the %d of -max-pixels", config.Width, config.Height, most)
	}
	m, _, err := image.Decode(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("the picture cannot be read: %w", err)
	}
	small, gray := shrink(m, size)
	var b bytes.Buffer
	if err := p.encode(&b, turn(small, p.orientation()), quality); err != nil {
		return nil, fmt.Errorf("the thumbnail cannot be written: %w", err)
	}
	return p.dressed(b.Bytes(), gray), nil
}

// shrink fits m into a square of size pixels. Everything is computed in floating point
// as WebAssembly defines it to the bit, and nothing is divided that can be 0.
func shrink(m image.Image, size int) (small draw.Image, gray bool) {
	w, h := m.Bounds().Dx(), m.Bounds().Dy()
	if longest := max(w, h); longest > size {
		w, h = max(1, (w*size+longest/2)/longest), max(1, (h*size+longest/2)/longest)
	}
	to := image.Rect(0, 0, w, h)
	switch m.ColorModel() {
	case color.GrayModel, color.Gray16Model:
		small, gray = image.NewGray(to), true
	default:
		small = image.NewRGBA(to)
	}
	if to.Size() == m.Bounds().Size() {
		draw.Draw(small, to, m, m.Bounds().Min, draw.Src)
	} else {
		draw.CatmullRom.Scale(small, to, m, m.Bounds(), draw.Src, nil)
	}
	return small, gray
}

// turn shows a picture as it is meant (Exif 2.32, 4.6.4.A, tag 274).
func turn(m draw.Image, orientation int) image.Image {
	if orientation == 1 {
		return m
	}
	w, h := m.Bounds().Dx(), m.Bounds().Dy()
	to := image.Rect(0, 0, w, h)
	if orientation >= 5 {
		to = image.Rect(0, 0, h, w)
	}
	var out draw.Image = image.NewRGBA(to)
	if _, gray := m.(*image.Gray); gray {
		out = image.NewGray(to)
	}
	for y := range h {
		for x := range w {
			tx, ty := x, y
			switch orientation {
			case 2:
				tx = w - 1 - x
			case 3:
				tx, ty = w-1-x, h-1-y
			case 4:
				ty = h - 1 - y
			case 5:
				tx, ty = y, x
			case 6:
				tx, ty = h-1-y, x
			case 7:
				tx, ty = h-1-y, w-1-x
			case 8:
				tx, ty = y, w-1-x
			}
			out.Set(tx, ty, m.At(x, y))
		}
	}
	return out
}

func (jpegPicture) encode(w io.Writer, m image.Image, quality int) error {
	return jpeg.Encode(w, m, &jpeg.Options{Quality: quality})
}

func (pngPicture) encode(w io.Writer, m image.Image, _ int) error {
	return (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(w, m)
}
